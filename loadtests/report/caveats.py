"""What a reader must know before believing the verdicts of a comparison, most important first."""

import numpy as np

from loadtests.experiment.model import Comparison
from loadtests.generator.load_result import LoadResult
from loadtests.report.conclusion import noise_floor
from loadtests.report.verdicts import Findings, counts, load_name, loads_of, uses_device
from loadtests.statistics import MIN_ROUNDS

_BUSY_CORES = 0.9
"""CPU of the generator's process, which can use one core and no more."""
_LATE_SHARE = 0.002
"""Part of the arrivals: a fifth of what lies beyond the 99th percentile."""
_KEEPING_UP = 0.95
"""Answered by offered rate: with less, the queue grows for as long as the load lasts."""
_FULL = 0.95
"""Part of the machine's cores."""

_Loads = list[tuple[str, list[LoadResult]]]
"""Each arm under each load, in words and block by block."""


def caveats(comparison: Comparison, findings: Findings) -> list[str]:
    """One sentence each."""
    said, lost = [], []
    for arm in comparison.plan.arms:
        count = counts(comparison, arm.label)
        failures = [block.failure for block in comparison.blocks if block.arm == arm.label and block.failure]
        if failures:
            of_all = f"{len(failures)} of {len(failures) + count['blocks']} blocks of {arm.label}"
            reasons = "; ".join(dict.fromkeys(reason.rstrip(".") for reason in failures))
            said.append(f"{of_all} failed and do not count: {reasons}.")
        elif not count["blocks"]:
            said.append(f"No block of {arm.label} was measured.")
        if count["errors"] or count["unsent"]:
            lost.append(
                f"{count['errors']:,} requests to {arm.label} were not answered with 200 and {count['unsent']:,} were "
                f"not sent, of {count['requests']:,} that were due: they count as infinitely slow."
            )
    said += lost
    said += [sentence for differs, sentence in noise_floor(comparison, findings) if differs]
    if (done := _complete_rounds(comparison)) < comparison.plan.default_rounds:
        few = f"; there are no intervals with fewer than {MIN_ROUNDS}" if done < MIN_ROUNDS else ""
        said.append(f"{done} of {comparison.plan.default_rounds} rounds: a quick look, not a result{few}.")
    loads = [(f"{label} at {load_name(comparison, name)}", found) for label, name, found in loads_of(comparison)]
    said += _generator(loads)
    if comparison.ended_early:
        said.append(f"The run ended early: {comparison.ended_early.rstrip('.')}.")
    if len(uses_device(comparison)) > 1:
        said.append("GPU memory is known for some blocks only: the memory compared is the host's.")
    return said + _overload(comparison, loads) + _full_machine(comparison, loads)


def _complete_rounds(comparison: Comparison) -> int:
    measured = {(block.arm, block.round) for block in comparison.blocks}
    rounds = {number for _, number in measured}
    return sum(all((arm.label, number) in measured for arm in comparison.plan.arms) for number in rounds)


def _generator(by_load: _Loads) -> list[str]:
    busy, late = [], []
    for what, loads in by_load:
        if (cores := float(np.median([load.generator_cores for load in loads]))) > _BUSY_CORES:
            busy.append(f"{cores:.2f} of a core with {what}")
        arrivals = max(1, sum(load.arrivals for load in loads))
        if (share := sum(load.late_arrivals for load in loads) / arrivals) > _LATE_SHARE:
            late.append(f"{share:.1%} with {what}")
    said = [f"The generator used {', '.join(busy)}: there it was the limit, not the server."] if busy else []
    if late:
        said.append(
            f"The generator sent requests 5 ms or more late: {', '.join(late)}. The highest percentiles there include "
            "this delay, which is not the server's."
        )
    return said


def _overload(comparison: Comparison, by_load: _Loads) -> list[str]:
    behind = []
    for what, loads in by_load:
        # Chance makes the arrivals of a short window fewer than the rate says.
        due = [min(load.offered_rate or 0, len(load.latencies_ms) / comparison.plan.seconds) for load in loads]
        if np.median([load.throughput - _KEEPING_UP * rate for load, rate in zip(loads, due, strict=True)]) < 0:
            behind.append(f"{what} (answered {np.median([load.throughput for load in loads]):.0f}/s)")
    means = "The latency there grows with the length of a block and means nothing."
    return [f"Overloaded: {', '.join(behind)}. {means}"] if behind else []


def _full_machine(comparison: Comparison, by_load: _Loads) -> list[str]:
    cores = float(comparison.environment.get("cores", "inf"))
    used = {
        what: float(np.median([load.server_cores + load.generator_cores for load in loads])) for what, loads in by_load
    }
    fullest = max(used, key=lambda what: used[what], default="")
    if not used or used[fullest] < _FULL * cores:
        return []
    return [
        f"Server and generator share the machine and together used up to {used[fullest]:.1f} of its {cores:g} cores "
        f"({fullest}): throughput is that of both."
    ]
