"""A comparison: interleaved blocks, each arm in a fresh server process, the same images in the same order.

First every arm is saturated once, briefly: that gives the rates of the open loops, which are the same for all arms,
and how long a block takes, to which the plan is then fitted. Then the blocks; then, arm by arm, the largest rate that
keeps the objective. Each is kept on disk when it is there (loadtests/experiment/store.py).
"""

import hashlib
import math
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtests.experiment.arms import bundles, describe, serving
from loadtests.experiment.json_files import to_json
from loadtests.experiment.locust_runner import RequestSpec, closed_loop, open_loop
from loadtests.experiment.model import HIGH, MODERATE, SATURATED, Arm, Block, CapacitySearch, Comparison, Plan
from loadtests.experiment.objective import MOST_SECONDS, Objective, largest_rate
from loadtests.experiment.schedule import Costs, fitted, order, tried
from loadtests.experiment.server import Server, ServerError
from loadtests.experiment.store import Store
from loadtests.generator import payload_cache
from loadtests.generator.load_result import LoadResult
from loadtests.generator.payloads import Payload

CALIBRATION_SECONDS = 3.0

_VOLATILE = ("load average before",)
"""Of the environment, what may differ when an interrupted comparison goes on."""
_JITTER_SECONDS = 1.0
_SETTLE_SECONDS = 1.0
"""After the last load, until memory is read again."""
_OVERRUN = 1.1
"""Of the budget, before a round is not begun any more."""

OnStep = Callable[[str, int, int], None]
"""What is done next, how much is done, of how much."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user wants to decide; None has it chosen when every arm has been tried."""

    seconds: float | None
    objective_ms: float | None
    rates: dict[str, float] | None = None
    """Of the open loops, as in `Comparison.rates`."""


def compare(
    comparison: Comparison,
    payloads: Sequence[Payload],
    out: Path,
    *,
    asked: Asked,
    fresh: bool,
    on_step: OnStep,
    on_plan: Callable[[Plan, float], None],
) -> None:
    """Fill `comparison`, whose plan is fitted to its budget; server logs are kept in `out`.

    `on_plan(plan, seconds left)` is told when the plan is settled. An arm that fails later only loses that block.
    Raises ServerError if an arm cannot be served at all, StoreError if `out` holds another comparison, ArmError if a
    commit cannot be had.
    """
    store = Store(out / "blocks")
    plan = comparison.plan
    wanted = {
        **to_json(plan),
        **asdict(asked),
        "payloads": _digest(payloads),
        "bundles": bundles(plan.arms, plan.repository),
        "environment": {name: value for name, value in comparison.environment.items() if name not in _VOLATILE},
    }
    # A later try may have more time.
    del wanted["budget_minutes"]
    settled = store.open(wanted, fresh=fresh)
    (out / "logs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stridevit-load-") as folder:
        files = Path(folder) / "payloads"
        files.mkdir()
        payload_cache.save(payloads, files)
        bench = _Bench(plan=comparison.plan, payloads=files, checkouts=Path(folder) / "checkouts", logs=out / "logs")
        bench.checkouts.mkdir()
        if not settled:
            settled = _settle(bench, asked, on_step=on_step)
            store.settle(settled)
        costs = Costs(**settled["costs"])
        plan = replace(plan, **settled["plan"])
        comparison.plan, comparison.rates = plan, settled["rates"]
        _measure(replace(bench, plan=plan), comparison, store, costs, on_step=on_step, on_plan=on_plan)
    comparison.finished = datetime.now(UTC)


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """All that a measurement needs beside its arm."""

    plan: Plan
    payloads: Path
    checkouts: Path
    logs: Path

    def serving(self, arm: Arm, what: str) -> Any:
        """The arm's server; its log's name says what for."""
        name = re.sub(r"[^\w.-]+", "-", arm.label)
        return serving(
            arm,
            repository=self.plan.repository,
            arguments=self.plan.service_arguments,
            checkouts=self.checkouts,
            log=self.logs / f"{what}-{name}.log",
        )

    def ask(self, arm: Arm) -> RequestSpec:
        """What is sent to it."""
        return RequestSpec(payloads=self.payloads, model=arm.model, protocol=self.plan.protocol)

    def saturate(self, arm: Arm, server: Server, seconds: float, *, seed: int) -> LoadResult:
        """The closed loop."""
        # A slow server answers in bursts, whose beat begins with the load. Were every window to begin at the same
        # moment of it, what it cuts off at its ends would look like a difference between arms.
        jitter = _JITTER_SECONDS * float(np.random.default_rng(seed).random())
        return closed_loop(
            server,
            self.ask(arm),
            connections=self.plan.connections,
            warmup_seconds=self.plan.warmup_seconds + jitter,
            seconds=seconds,
        )

    def offer(self, arm: Arm, server: Server, rate: float, *, seconds: float, seed: int) -> LoadResult:
        """The open loop."""
        return open_loop(
            server,
            self.ask(arm),
            rate=rate,
            warmup_seconds=self.plan.warmup_seconds,
            seconds=seconds,
            seed=seed,
        )


def _settle(bench: _Bench, asked: Asked, *, on_step: OnStep) -> dict[str, Any]:
    """Saturate every arm once, and decide by it what must be the same for all blocks."""
    plan, arms = bench.plan, tried(bench.plan)
    throughputs, serving_seconds, generator_seconds = [], [], []
    for number, arm in enumerate(arms):
        on_step(f"calibrating {arm.label}", number, len(arms))
        began = time.monotonic()
        with bench.serving(arm, "calibration") as server:
            ready = time.monotonic()
            load = bench.saturate(arm, server, CALIBRATION_SECONDS, seed=plan.seed)
            loaded = time.monotonic()
        if not load.throughput:
            raise ServerError(f"{server.name} answered nothing with 200; its log: {server.log}\n{server.log_tail()}")
        throughputs.append(load.throughput)
        serving_seconds.append(ready - began + time.monotonic() - loaded)
        generator_seconds.append(loaded - ready - CALIBRATION_SECONDS - plan.warmup_seconds - 1)
    costs = Costs(
        server=float(np.mean(serving_seconds)) + _SETTLE_SECONDS, generator=max(0.0, float(np.mean(generator_seconds)))
    )
    slowest = min(throughputs)
    percentile = Objective(ms=0.0, percentile=plan.objective_percentile)
    costs = replace(costs, probe=min(MOST_SECONDS, percentile.probe_seconds(slowest / 2, 0.0)))
    fits = fitted(plan, costs, seconds=asked.seconds)
    chosen = {MODERATE: rounded(plan.load_fractions[0] * slowest), HIGH: rounded(plan.load_fractions[1] * slowest)}
    return {
        "costs": asdict(costs),
        "rates": asked.rates or chosen,
        "plan": {
            "seconds": fits.seconds,
            "rounds": fits.rounds,
            "objective_ms": asked.objective_ms or one_two_five(1000 * plan.connections / slowest),
        },
    }


def _measure(
    bench: _Bench,
    comparison: Comparison,
    store: Store,
    costs: Costs,
    *,
    on_step: OnStep,
    on_plan: Callable[[Plan, float], None],
) -> None:
    plan = bench.plan
    blocks = order(plan.arms, plan.rounds, seed=plan.seed)
    searches = [(number, arm) for number in range(plan.capacity_searches) for arm in tried(plan)]
    total = len(blocks) + len(searches)
    kept, kept_searches = _whole_rounds(store.blocks(), len(plan.arms)), store.searches()
    comparison.blocks, comparison.capacity_searches = list(kept.values()), list(kept_searches.values())
    left = costs.whole(plan) - len(kept) * costs.block(plan) - len(kept_searches) * costs.search(plan)
    on_plan(plan, left)
    deadline = time.monotonic() + max(left, _OVERRUN * plan.budget_minutes * 60)
    for number, (round_number, arm) in enumerate(blocks):
        if number in kept:
            continue
        begins = number % len(plan.arms) == 0
        if begins and round_number >= 2 and time.monotonic() + len(plan.arms) * costs.block(plan) > deadline:
            comparison.ended_early = (
                f"the budget of {plan.budget_minutes:g} minutes was spent after {round_number} of {plan.rounds} rounds"
            )
            return
        on_step(f"round {round_number + 1} of {plan.rounds}, {arm.label}", number, total)
        block = _block(bench, arm, round_number, comparison.rates)
        store.add(block, number)
        comparison.blocks.append(block)
    for number, (round_number, arm) in enumerate(searches):
        if number in kept_searches:
            continue
        if time.monotonic() + costs.search(plan) > deadline:
            comparison.ended_early = f"the budget of {plan.budget_minutes:g} minutes was spent before the last search"
            return
        on_step(f"largest rate of {arm.label}", len(blocks) + number, total)
        search = _search(bench, arm, round_number, comparison)
        store.add_search(search, number)
        comparison.capacity_searches.append(search)


def _whole_rounds(blocks: dict[int, Block], arms: int) -> dict[int, Block]:
    """Those of complete rounds: a round that was interrupted would pair blocks of different days."""
    return {
        number: block
        for number, block in blocks.items()
        if all(number // arms * arms + place in blocks for place in range(arms))
    }


def _block(bench: _Bench, arm: Arm, number: int, rates: dict[str, float]) -> Block:
    plan = bench.plan
    loads: dict[str, LoadResult] = {}
    try:
        with bench.serving(arm, f"round{number + 1:02d}") as server:
            info = describe(arm, server, plan.repository)
            idle = server.memory_bytes()
            for name, rate in rates.items():
                # Every arm gets the same arrivals; each round others.
                loads[name] = bench.offer(arm, server, rate, seconds=plan.seconds, seed=plan.seed + number)
            loads[SATURATED] = bench.saturate(arm, server, plan.seconds, seed=plan.seed + number)
            if not loads[SATURATED].throughput:
                raise ServerError(f"{server.name} answered nothing with 200 at saturation")
            time.sleep(_SETTLE_SECONDS)
            after = server.memory_bytes()
            if not server.alive():
                raise ServerError(f"{server.name} died when its loads were over; its log: {server.log}")
    except ServerError as error:
        return Block(arm=arm.label, round=number, failure=str(error))
    return Block(arm=arm.label, round=number, idle_bytes=idle, after_bytes=after, loads=loads, info=info)


def _search(bench: _Bench, arm: Arm, number: int, comparison: Comparison) -> CapacitySearch:
    plan = bench.plan
    measured = [block.loads[SATURATED].throughput for block in comparison.blocks_of(arm.label)]
    objective = Objective(ms=plan.objective_ms, percentile=plan.objective_percentile)
    try:
        with bench.serving(arm, f"search{number + 1:02d}") as server:

            def probe(rate: float, seconds: float, probe_number: int) -> npt.NDArray[np.float64]:
                seed = plan.seed + 1000 * (number + 1) + probe_number
                return bench.offer(arm, server, rate, seconds=seconds, seed=seed).latencies_ms

            return largest_rate(
                arm.label,
                number,
                objective,
                saturated=float(np.median(measured)) if measured else 0.0,
                seconds=plan.seconds,
                probe=probe,
            )
    except ServerError as error:
        return CapacitySearch(
            arm=arm.label, round=number, rate=None, probes=(), reason=str(error).splitlines()[0], failed=True
        )


def _digest(payloads: Sequence[Payload]) -> str:
    digest = hashlib.sha256()
    for payload in payloads:
        digest.update(f"{payload.name}\0{payload.label}\0{len(payload.data)}\0".encode())
        digest.update(payload.data)
    return digest.hexdigest()


def rounded(rate: float) -> float:
    """To two digits: a rate that one can say."""
    return round(rate, 1 - math.floor(math.log10(rate)))


def one_two_five(number: float) -> float:
    """The next of 1, 2, 5, 10, 20, ..."""
    power = 10.0 ** math.floor(math.log10(number))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= number)
