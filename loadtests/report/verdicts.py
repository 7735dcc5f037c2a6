"""What a comparison says: every metric of every arm, and whether it is better or worse than the baseline's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from loadtests.experiment.model import HIGH, LOADS, MODERATE, SATURATED, Arm, Block, Comparison
from loadtests.generator.load_result import LoadResult
from loadtests.report.top1 import top1_effect, top1_percent
from loadtests.statistics import MIN_BEYOND, Effect, Holm, holm, paired_difference, paired_ratio, percentile

Verdict = Literal["better", "worse", "no difference seen"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A quantity that is compared; its name ends with its unit."""

    name: str
    load: str | None = None
    """The load under which it is measured; None for top-1, and for memory, whose peak is that of all loads."""
    rank: int | None = None
    """The percentile, for latencies."""
    better: Literal["higher", "lower"] = "lower"
    kind: Literal["ratio", "difference"] = "difference"
    """How two arms are compared."""


TOP1 = Metric(name="top1_percent", better="higher")
THROUGHPUT = Metric(name="images_per_second", load=SATURATED, better="higher", kind="ratio")
LATENCIES = tuple(
    Metric(name=f"p{rank}_ms", load=load, rank=rank) for load in (MODERATE, HIGH) for rank in (50, 95, 99)
)
MEMORY = Metric(name="peak_bytes", kind="ratio")
METRICS = (TOP1, THROUGHPUT, *LATENCIES, MEMORY)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One arm's metric against the baseline's."""

    estimate: float
    """A ratio (arm / baseline), or a difference (arm - baseline) in the metric's unit; of top-1, in points."""
    low: float
    high: float
    """Ends of the interval at `level`."""
    level: float
    """Confidence; above 0.95, because all comparisons of the report share its 5 %."""
    p_value: float
    """Adjusted (Holm) for all comparisons of the report: below 0.05 where a difference is seen."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of one arm."""

    arm: str
    """Its label."""
    metric: Metric
    value: float | None
    """None if it is unknown, or has too few samples. Infinite: that percentile of the requests was not answered."""
    smallest: float | None
    """The smallest and the largest value of a block."""
    largest: float | None
    change: Change | None
    """None for the baseline, and where there are too few blocks for an interval."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The blocks and requests of one arm."""

    arm: Arm
    blocks: int
    """Measured to their end."""
    failures: list[str]
    """Why blocks failed."""
    errors: int
    """Requests that were not answered with 200, over all loads."""
    unsent: int
    requests: int
    """All that were due."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """One row for each metric and arm, metric by metric, and the counts of each arm."""

    rows: list[Row]
    counts: list[Counts]

    @property
    def metrics(self) -> list[Metric]:
        """Those that were measured."""
        return list(dict.fromkeys(row.metric for row in self.rows))

    @property
    def headline(self) -> list[Metric]:
        """The metrics of the verdict table and the conclusion."""
        return [metric for metric in self.metrics if metric.rank != 95]

    def row(self, arm: str, metric: Metric) -> Row | None:
        """A metric of one arm, by its label."""
        return next((row for row in self.rows if (row.arm, row.metric) == (arm, metric)), None)

    def value(self, arm: str, metric: Metric) -> float | None:
        """Its value alone."""
        row = self.row(arm, metric)
        return row.value if row else None


def judge(comparison: Comparison, *, alpha: float = 0.05) -> Findings:
    """Compare every arm with the first; at most `alpha` of the reports on equal arms see any difference.

    Values are medians of the blocks' throughputs, percentiles of the latencies of all blocks, the largest peak of
    memory, and the manifest's top-1. Changes are those of the pairs of blocks that share a round: the mean ratio of
    their throughputs or peaks, the mean difference of their own percentiles. Where one round went very badly, a change
    may therefore differ from that of the values, and its interval is wide. See `loadtests.statistics`.
    """
    on_device, arms = all(uses_device(comparison)), comparison.plan.arms
    metrics = [metric for metric in METRICS if metric.load in {None, SATURATED, *comparison.rates}]
    blocks = {arm.label: comparison.blocks_of(arm.label) for arm in arms}
    effects = {
        (arm.label, metric): effect
        for arm in arms[1:]
        for metric in metrics
        if (effect := _effect(metric, blocks[arm.label], blocks[arms[0].label], on_device)) is not None
    }
    tests = dict(zip(effects, holm([effect.p_value for effect in effects.values()], alpha), strict=True))
    changes = {key: _change(key[1], effect, tests[key]) for key, effect in effects.items()}
    return Findings(
        rows=[
            _row(arm, metric, blocks[arm.label], changes.get((arm.label, metric)), on_device)
            for metric in metrics
            for arm in arms
        ],
        counts=[_counts(comparison, arm) for arm in arms],
    )


def uses_device(comparison: Comparison) -> set[bool]:
    """Whether memory of a GPU is known for blocks: for all (True), for none (False), or for some only (both)."""
    known = {
        any(load.device_bytes is not None for load in block.loads.values())
        for arm in comparison.plan.arms
        for block in comparison.blocks_of(arm.label)
    }
    return known or {False}


def block_value(block: Block, metric: Metric, *, on_device: bool = False, min_beyond: int = MIN_BEYOND) -> float | None:
    """A metric of one block, None where it is unknown, or fewer than `min_beyond` samples lie beyond a percentile."""
    if metric == TOP1:
        return top1_percent(block.info)
    if metric == MEMORY:
        peaks = (load.device_bytes or 0 if on_device else load.peak_bytes for load in block.loads.values())
        return float(max(peaks, default=0)) or None
    load = block.loads.get(metric.load or "")
    if load is None or metric.rank is None:
        return load.throughput if load else None
    if load.percentiles_ms:
        return load.percentiles_ms.get(metric.name)
    return percentile(load.latencies_ms, metric.rank, min_beyond=min_beyond)


def loads_of(comparison: Comparison) -> list[tuple[str, str, list[LoadResult]]]:
    """(label of the arm, name of the load, its results block by block), load by load; only what was measured."""
    found = [
        (arm.label, name, [block.loads[name] for block in comparison.blocks_of(arm.label) if name in block.loads])
        for name in LOADS
        for arm in comparison.plan.arms
    ]
    return [one for one in found if one[2]]


def model_info(comparison: Comparison, label: str) -> dict[str, Any]:
    """What the service said about an arm's model; empty if it never answered."""
    return next((block.info for block in comparison.blocks if block.arm == label and block.info), {})


def _row(arm: Arm, metric: Metric, blocks: Sequence[Block], change: Change | None, on_device: bool) -> Row:
    known = [one for block in blocks if (one := block_value(block, metric, on_device=on_device)) is not None]
    value: float | None = None
    if metric.rank is not None:
        value = percentile(_pooled(blocks, metric), metric.rank)
    elif known:
        value = max(known) if metric == MEMORY else float(np.median(known))
    return Row(
        arm=arm.label,
        metric=metric,
        value=value,
        smallest=min(known, default=None),
        largest=max(known, default=None),
        change=change,
    )


def _counts(comparison: Comparison, arm: Arm) -> Counts:
    blocks = comparison.blocks_of(arm.label)
    loads: list[LoadResult] = [load for block in blocks for load in block.loads.values()]
    return Counts(
        arm=arm,
        blocks=len(blocks),
        failures=[block.failure for block in comparison.blocks if block.arm == arm.label and block.failure],
        errors=sum(load.errors for load in loads),
        unsent=sum(load.unsent_arrivals for load in loads),
        requests=sum(len(load.latencies_ms) for load in loads),
    )


def _pooled(blocks: Sequence[Block], metric: Metric) -> npt.NDArray[np.float64]:
    loads = [block.loads[metric.load] for block in blocks if metric.load in block.loads]
    return np.concatenate([np.empty(0), *(load.latencies_ms for load in loads)])


def _effect(metric: Metric, arm: Sequence[Block], baseline: Sequence[Block], on_device: bool) -> Effect | None:
    if metric == TOP1:
        return top1_effect(arm[0].info, baseline[0].info) if arm and baseline else None
    ours, theirs = (
        {
            block.round: value
            for block in blocks
            if (value := block_value(block, metric, on_device=on_device, min_beyond=0)) is not None
        }
        for blocks in (arm, baseline)
    )
    rounds = sorted(ours.keys() & theirs.keys())
    pairs = [ours[number] for number in rounds], [theirs[number] for number in rounds]
    if metric.kind == "ratio":
        return paired_ratio(*pairs)
    pools = [_pooled(blocks, metric) for blocks in (arm, baseline)]
    if any(percentile(pool, metric.rank or 0) is None for pool in pools):
        return None
    latencies = np.concatenate(pools)
    return paired_difference(*pairs, ceiling=max(latencies[np.isfinite(latencies)], default=math.inf))


def _change(metric: Metric, effect: Effect, test: Holm) -> Change:
    estimate, low, high = effect.at(test.level)
    none = 1.0 if metric.kind == "ratio" else 0.0
    verdict: Verdict = "no difference seen"
    # An exact test and its interval may disagree by a hair: then no difference is seen.
    if test.rejected and not low <= none <= high:
        verdict = "better" if (low > none) == (metric.better == "higher") else "worse"
    return Change(estimate=estimate, low=low, high=high, level=test.level, p_value=test.p_value, verdict=verdict)
