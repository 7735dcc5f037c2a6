"""What a comparison says: every arm's figures, and for each whether it is better or worse than the baseline's."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from loadtests.experiment.model import HIGH, MODERATE, SATURATED, Arm, Block, Comparison
from loadtests.generator.load_result import LoadResult
from loadtests.statistics import (
    MIN_ROUNDS,
    Effect,
    Holm,
    difference_of_shares,
    holm,
    interpolated,
    paired_difference,
    paired_ratio,
    percentile,
)

Verdict = Literal["better", "worse", "no difference seen"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure that is compared."""

    key: str
    """throughput, moderate_p50, moderate_p95, moderate_p99, high_p50, high_p95, high_p99, peak_bytes, top1."""
    name: str
    """For headings: `p99 ms at 340/s`."""
    better: Literal["higher", "lower"]
    kind: Literal["ratio", "difference"]
    """How two arms are compared."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """An arm's figure against the baseline's."""

    estimate: float
    """A ratio (arm / baseline), or a difference (arm - baseline) in the metric's unit."""
    low: float
    high: float
    """Interval at `level`."""
    level: float
    """Confidence; above 0.95 where several comparisons share the report's 5 %."""
    p_value: float
    """Adjusted (Holm) for all comparisons of the report: below 0.05 where a difference is seen."""
    verdict: Verdict
    """By the interval alone: `no difference seen` where it holds no difference."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of the verdict table."""

    value: float | None
    """None: not known, or too few samples. Infinite: that percentile of the requests was not answered."""
    smallest: float | None
    largest: float | None
    """Of the blocks."""
    change: Change | None
    """None for the baseline, and where the blocks do not suffice for an interval."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm."""

    arm: Arm
    figures: dict[str, Figure]
    """By the key of the metric."""
    blocks: int
    failed: list[str]
    """Of its failed blocks, why."""
    errors: int
    """Requests not answered with 200, over all loads; likewise the unsent and all that were due."""
    unsent_arrivals: int
    requests: int


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The verdict table and what must be said with it."""

    metrics: list[Metric]
    rows: list[Row]
    warnings: list[str] = field(default_factory=list)
    """What a reader must know before believing the table, most important first."""


def judge(comparison: Comparison, *, alpha: float = 0.05) -> Findings:
    """Compare every arm with the first; at most `alpha` of the reports on equal arms may see any difference.

    Values are medians of the blocks' throughputs (images a second), percentiles of the latencies of all blocks (ms),
    the largest peak of memory (bytes) and the manifest's share of right answers (0 to 1). Changes are of the pairs of
    blocks that share a round: the mean ratio of their throughputs or peaks, the mean difference of their own
    percentiles. Where one round went very badly, a change may therefore differ from that of the values, and its
    interval is wide. How the intervals are made, and what was simulated: see `loadtests.statistics`.
    """
    on_device, arms = _uses_device(comparison), comparison.plan.arms
    whole = all(on_device)
    metrics = _metrics(comparison.rates, on_device=whole)
    effects = {
        (arm.label, metric.key): effect
        for arm in arms[1:]
        for metric in metrics
        if (effect := _effect(metric, comparison.blocks_of(arm.label), comparison.blocks_of(arms[0].label), whole))
        is not None
    }
    tests = dict(zip(effects, holm([effect.p_value for effect in effects.values()], alpha), strict=True))
    rows = []
    for arm in arms:
        blocks = comparison.blocks_of(arm.label)
        loads = [load for block in blocks for load in block.loads.values()]
        figures = {}
        for metric in metrics:
            found = (arm.label, metric.key)
            change = _change(metric, effects[found], tests[found]) if found in effects else None
            figures[metric.key] = _figure(metric.key, blocks, change, whole)
        rows.append(
            Row(
                arm=arm,
                figures=figures,
                blocks=len(blocks),
                failed=[block.failure for block in comparison.blocks if block.arm == arm.label and block.failure],
                errors=sum(load.errors for load in loads),
                unsent_arrivals=sum(load.unsent_arrivals for load in loads),
                requests=sum(len(load.latencies_ms) for load in loads),
            )
        )
    return Findings(metrics=metrics, rows=rows, warnings=_warnings(comparison, metrics, rows))


def block_figure(block: Block, key: str, *, however_few: bool = False, on_device: bool = False) -> float | None:
    """One block's figure by a metric's key (not top1), None where not known; `however_few` samples a percentile has.

    Memory is the host's, or the GPU's if it is to be `on_device`.
    """
    if key == "peak_bytes":
        peaks = (load.device_bytes or 0 if on_device else load.peak_bytes for load in block.loads.values())
        return float(max(peaks, default=0)) or None
    if key == "throughput":
        return block.loads[SATURATED].throughput if SATURATED in block.loads else None
    name, _, rank = key.rpartition("_p")
    if name not in block.loads or not len(block.loads[name].latencies_ms):
        return None
    return (interpolated if however_few else percentile)(block.loads[name].latencies_ms, float(rank))


def _uses_device(comparison: Comparison) -> set[bool]:
    """Whether memory of a GPU is known of blocks: of all (True), of none (False), or of some only (both)."""
    known = {
        any(load.device_bytes is not None for load in block.loads.values())
        for arm in comparison.plan.arms
        for block in comparison.blocks_of(arm.label)
    }
    return known or {False}


def _metrics(rates: dict[str, float], *, on_device: bool = False) -> list[Metric]:
    memory = "peak GPU memory MB" if on_device else "peak memory MB"
    return [
        Metric(key="top1", name="top-1", better="higher", kind="difference"),
        Metric(key="throughput", name="images/s", better="higher", kind="ratio"),
        *(
            Metric(key=f"{name}_p{rank}", name=f"p{rank} ms at {rates[name]:g}/s", better="lower", kind="difference")
            for name in (MODERATE, HIGH)
            if name in rates
            for rank in (50, 95, 99)
        ),
        Metric(key="peak_bytes", name=memory, better="lower", kind="ratio"),
    ]


def _figure(key: str, blocks: list[Block], change: Change | None, on_device: bool) -> Figure:
    if key == "top1":
        accuracy = _accuracy(blocks)
        top1 = accuracy[0] if accuracy else None
        return Figure(value=top1, smallest=top1, largest=top1, change=change)
    each = [found for block in blocks if (found := block_figure(block, key, on_device=on_device)) is not None]
    value: float | None = None
    if key not in {"throughput", "peak_bytes"}:
        name, _, rank = key.rpartition("_p")
        value = percentile(_pooled(blocks, name), float(rank))
    elif each:
        value = float(np.median(each)) if key == "throughput" else max(each)
    return Figure(value=value, smallest=min(each, default=None), largest=max(each, default=None), change=change)


def _accuracy(blocks: list[Block]) -> tuple[float, int, str] | None:
    """Of the manifest: top-1, of how many images, and which they are."""
    known = blocks[0].info.get("accuracy") if blocks else None
    return (known["top1"], known["n"], f"{known.get('dataset')} {known.get('split')}") if known else None


def _pooled(blocks: list[Block], name: str) -> npt.NDArray[np.float64]:
    return np.concatenate([np.empty(0), *(block.loads[name].latencies_ms for block in blocks if name in block.loads)])


def _effect(metric: Metric, arm: list[Block], baseline: list[Block], on_device: bool) -> Effect | None:
    if metric.key == "top1":
        ours, theirs = _accuracy(arm), _accuracy(baseline)
        # Shares of right answers among other images cannot be compared.
        same = ours and theirs and ours[2] == theirs[2]
        return difference_of_shares(*ours[:2], *theirs[:2]) if ours and theirs and same else None
    values = [
        {
            block.round: value
            for block in blocks
            if (value := block_figure(block, metric.key, however_few=True, on_device=on_device)) is not None
        }
        for blocks in (arm, baseline)
    ]
    rounds = sorted(values[0].keys() & values[1].keys())
    pairs = [[value[number] for number in rounds] for value in values]
    if metric.kind == "ratio":
        return paired_ratio(*pairs)
    name, _, rank = metric.key.rpartition("_p")
    pools = [_pooled(blocks, name) for blocks in (arm, baseline)]
    if any(percentile(pool, float(rank)) is None for pool in pools):
        return None
    answered = np.concatenate(pools)
    return paired_difference(*pairs, ceiling=max(answered[np.isfinite(answered)], default=math.inf))


def _change(metric: Metric, effect: Effect, test: Holm) -> Change:
    estimate, low, high = effect.at(test.level)
    even = 1.0 if metric.kind == "ratio" else 0.0
    verdict: Verdict = "no difference seen"
    if low > even or high < even:
        verdict = "better" if (low > even) == (metric.better == "higher") else "worse"
    return Change(estimate=estimate, low=low, high=high, level=test.level, p_value=test.p_value, verdict=verdict)


_BUSY_CORES = 0.9
"""Of a generator's process, which can use one core and no more."""
_LATE_SHARE = 0.002
"""Of the arrivals: a fifth of what lies beyond the 99th percentile."""
_KEEPING_UP = 0.95
"""Answered by offered: with less, the queue grows for as long as the load lasts."""
_FULL = 0.95
"""Of the machine's cores."""


def _warnings(comparison: Comparison, metrics: list[Metric], rows: list[Row]) -> list[str]:
    said = []
    for row in rows:
        if row.failed:
            failed, reasons = len(row.failed), "; ".join(dict.fromkeys(why.rstrip(".") for why in row.failed))
            of_all = f"{failed} of {row.blocks + failed} blocks of {row.arm.label}"
            said.append(f"{of_all} failed and do not count: {reasons}.")
        elif not row.blocks:
            said.append(f"No block of {row.arm.label} was measured.")
    said += [
        f"{row.errors:,} requests to {row.arm.label} were not answered with 200 and {row.unsent_arrivals:,} were not "
        f"sent, of {row.requests:,} that were due: they count as infinitely slow."
        for row in rows
        if row.errors or row.unsent_arrivals
    ]
    said += _noise(comparison, metrics, rows)
    if (done := _complete_rounds(comparison)) < comparison.plan.default_rounds:
        few = f"; there are no intervals with fewer than {MIN_ROUNDS}" if done < MIN_ROUNDS else ""
        said.append(f"{done} of {comparison.plan.default_rounds} rounds: a look, not a result{few}.")
    said += _generator(comparison)
    if comparison.ended_early:
        said.append(f"The run ended early: {comparison.ended_early.rstrip('.')}.")
    if len(_uses_device(comparison)) > 1:
        said.append("Memory of the GPU is known of some blocks only: what is compared is the host's.")
    return said + _overload(comparison) + _full_machine(comparison)


def _complete_rounds(comparison: Comparison) -> int:
    measured = {(block.arm, block.round) for block in comparison.blocks}
    rounds = {number for _, number in measured}
    return sum(all((arm.label, number) in measured for arm in comparison.plan.arms) for number in rounds)


def _noise(comparison: Comparison, metrics: list[Metric], rows: list[Row]) -> list[str]:
    said = []
    for row in rows:
        changes = {metric.name: row.figures[metric.key].change for metric in metrics}
        seen = [name for name, change in changes.items() if change and change.verdict != "no difference seen"]
        if seen and row.arm.repeat_of == comparison.plan.arms[0].label:
            said.append(
                f"{row.arm.label} differs from {row.arm.repeat_of}, which is the same, in {', '.join(seen)}: the "
                f"machine, not the models, makes such differences, so do not believe others of that size here."
            )
    return said


def _each(comparison: Comparison) -> list[tuple[str, list[LoadResult]]]:
    """Every arm under every load, in words and block by block."""
    loads = {SATURATED: "at saturation", **{name: f"at {rate:g}/s" for name, rate in comparison.rates.items()}}
    return [
        (f"{arm.label} {words}", found)
        for arm in comparison.plan.arms
        for name, words in loads.items()
        if (found := [block.loads[name] for block in comparison.blocks_of(arm.label) if name in block.loads])
    ]


def _generator(comparison: Comparison) -> list[str]:
    busy, late = [], []
    for what, loads in _each(comparison):
        if (cores := float(np.median([load.generator_cores for load in loads]))) > _BUSY_CORES:
            busy.append(f"{cores:.2f} of a core with {what}")
        if (
            share := sum(load.late_arrivals for load in loads) / max(1, sum(load.arrivals for load in loads))
        ) > _LATE_SHARE:
            late.append(f"{share:.1%} with {what}")
    limit = "the generator, not the server, was the limit there"
    said = [f"The generator used {', '.join(busy)}: {limit}."] if busy else []
    if late:
        said.append(
            f"The generator sent requests 5 ms or more late, {', '.join(late)}: this is its own doing, and part of the "
            "highest percentiles there."
        )
    return said


def _overload(comparison: Comparison) -> list[str]:
    behind = []
    for what, loads in _each(comparison):
        # Chance makes the arrivals of a short window fewer than the rate says.
        due = [min(load.offered_rate or 0, len(load.latencies_ms) / comparison.plan.seconds) for load in loads]
        if np.median([load.throughput - _KEEPING_UP * rate for load, rate in zip(loads, due, strict=True)]) < 0:
            behind.append(f"{what} (answered {np.median([load.throughput for load in loads]):.0f}/s)")
    return (
        [f"Overloaded: {', '.join(behind)}; there latency grows with the length of a block, so it says nothing else."]
        if behind
        else []
    )


def _full_machine(comparison: Comparison) -> list[str]:
    cores = float(comparison.environment.get("cores", "inf"))
    used = {
        what: float(np.median([load.server_cores + load.generator_cores for load in loads]))
        for what, loads in _each(comparison)
    }
    fullest = max(used, key=lambda what: used[what], default="")
    if not used or used[fullest] < _FULL * cores:
        return []
    return [
        f"Note: server and generator share the machine and together used up to {used[fullest]:.1f} of its {cores:g} "
        f"cores ({fullest}), so throughput is that of both."
    ]
