"""A comparison: interleaved blocks, each arm in a fresh server process, the same images in the same order.

First every arm is saturated once, briefly: that gives the rates of the open loops, which are the same for all arms,
and the duration of a block, by which the plan is fitted to its budget. Then the blocks run; then, arm by arm, the
searches for the largest rate that meets the objective.
"""

import math
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtests.experiment.capacity import MOST_SECONDS, find_capacity, probe_seconds
from loadtests.experiment.load_runner import BEYOND_SECONDS
from loadtests.experiment.model import (
    HIGH,
    LOADS,
    MODERATE,
    SATURATED,
    Arm,
    CapacitySearch,
    Comparison,
    ComparisonPlan,
    Load,
    Progress,
)
from loadtests.experiment.run import SETTLE_SECONDS, Bench
from loadtests.experiment.schedule import Costs, fitted, without_repeats
from loadtests.experiment.server import ServerError

CALIBRATION_SECONDS = 3.0
_OVERRUN = 1.1
"""A round is not begun if it would end after this many times the budget."""


def compare(bench: Bench, comparison: Comparison, progress: Progress, *, fresh: bool) -> None:
    """Fill `comparison`, the bench's experiment, and fit its plan to its budget.

    `seconds` and `objective_ms` of the plan are kept unless they are 0, and `comparison.rates` if there are any. An arm
    that fails later only loses that block. Raises ServerError if an arm cannot be served at all, StoreError if the
    store holds another comparison, CommitError if a commit is not available.
    """
    # A resumed comparison may be given more time.
    with bench.opened(progress, fresh=fresh, rates=comparison.rates, budget_minutes=None) as kept:
        if not (settled := kept):
            settled = _calibrate(bench, comparison, progress)
            bench.store.settle(settled)
        comparison.plan, comparison.rates = replace(comparison.plan, **settled["plan"]), settled["rates"]
        _measure(bench, comparison, Costs(**settled["costs"]), progress)


def _calibrate(bench: Bench, comparison: Comparison, progress: Progress) -> dict[str, Any]:
    """Saturate every arm once, and derive from it what must be the same for all blocks."""
    plan = comparison.plan
    arms, saturate = without_repeats(plan), Load(name=SATURATED, connections=plan.connections)
    throughputs, serving_seconds, generator_seconds = [], [], []
    for number, arm in enumerate(arms):
        progress.step(f"calibrating {arm.label}", number, len(arms))
        began = time.monotonic()
        with bench.serving(arm, "calibration") as server:
            ready = time.monotonic()
            throughputs.append(bench.apply(arm, server, saturate, seconds=CALIBRATION_SECONDS, seed=0).throughput)
            loaded = time.monotonic()
        serving_seconds.append(ready - began + time.monotonic() - loaded)
        generator_seconds.append(loaded - ready - CALIBRATION_SECONDS - plan.warmup_seconds - BEYOND_SECONDS)
    slowest = min(throughputs)
    costs = Costs(
        server=float(np.mean(serving_seconds)) + SETTLE_SECONDS,
        generator=max(0.0, float(np.mean(generator_seconds))),
        probe=min(MOST_SECONDS, probe_seconds(plan, slowest / 2)),
    )
    fits = fitted(plan, costs)
    moderate, high = (rounded(fraction * slowest) for fraction in plan.load_fractions)
    objective_ms = plan.objective_ms or one_two_five(1000 * plan.connections / slowest)
    return {
        "costs": asdict(costs),
        "rates": comparison.rates or {MODERATE: moderate, HIGH: high},
        "plan": {"seconds": fits.seconds, "rounds": fits.rounds, "objective_ms": objective_ms},
    }


def _measure(bench: Bench, comparison: Comparison, costs: Costs, progress: Progress) -> None:
    plan = comparison.plan
    searches = [(number, arm) for number in range(plan.capacity_searches) for arm in without_repeats(plan)]
    found = bench.store.searches()
    comparison.capacity_searches = list(found.values())
    left = costs.whole(plan) - len(bench.store.blocks()) * costs.block(plan) - len(found) * costs.search(plan)
    progress.note(_summary(plan, comparison.rates, left))
    deadline = time.monotonic() + max(left, _OVERRUN * plan.budget_minutes * 60)
    loads = [Load(name=name, rate=rate) for name, rate in comparison.rates.items()]
    loads.append(Load(name=SATURATED, connections=plan.connections))
    spent = f"the budget of {plan.budget_minutes:g} minutes was spent"

    def stop(number: int) -> str | None:
        late = time.monotonic() + len(plan.arms) * costs.block(plan) > deadline
        return f"{spent} after {number} of {plan.rounds} rounds" if number >= 2 and late else None

    bench.rounds(lambda _: loads, progress, further_steps=len(searches), stop=stop)
    blocks = plan.rounds * len(plan.arms)
    for number, (round_number, arm) in enumerate(searches):
        if number in found or comparison.ended_early:
            continue
        if time.monotonic() + costs.search(plan) > deadline:
            comparison.ended_early = f"{spent} before the last search"
            return
        progress.step(f"largest rate of {arm.label}", blocks + number, blocks + len(searches))
        search = _search(bench, arm, round_number, comparison)
        bench.store.add(search, number)
        comparison.capacity_searches.append(search)


def _search(bench: Bench, arm: Arm, number: int, comparison: Comparison) -> CapacitySearch:
    throughputs = [block.loads[SATURATED].throughput for block in comparison.blocks_of(arm.label)]
    saturated = float(np.median(throughputs)) if throughputs else 0.0
    try:
        with bench.serving(arm, f"search{number + 1:02d}") as server:

            def probe(rate: float, seconds: float, probe_number: int) -> npt.NDArray[np.float64]:
                load, seed = Load(name="probe", rate=rate), 1000 * (number + 1) + probe_number
                return bench.apply(arm, server, load, seconds=seconds, seed=seed).latencies_ms

            return find_capacity(comparison.plan, arm.label, number, saturated=saturated, probe=probe)
    except ServerError as error:
        reason = str(error).splitlines()[0]
        return CapacitySearch(arm=arm.label, round=number, rate=None, probes=(), reason=reason, failed=True)


def _summary(plan: ComparisonPlan, rates: dict[str, float], left: float) -> str:
    loops = " and ".join(f"{rate:g}/s" for rate in rates.values())
    return (
        f"{plan.rounds} rounds of {len(plan.arms)} arms, {len(LOADS)} loads of {plan.seconds:g} s each: open loops at "
        f"{loops}, a closed loop with {plan.connections} connections; objective: p{plan.objective_percentile:g} within "
        f"{plan.objective_ms:g} ms; about {left / 60:.0f} minutes left"
    )


def rounded(rate: float) -> float:
    """Two significant digits: a rate that is easy to read and to repeat."""
    return round(rate, 1 - math.floor(math.log10(rate)))


def one_two_five(number: float) -> float:
    """The next of 1, 2, 5, 10, 20, ..."""
    power = 10.0 ** math.floor(math.log10(number))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= number)
