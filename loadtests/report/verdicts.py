"""What a comparison says: every metric of every arm, and whether it is better or worse than the baseline's."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from loadtests.experiment.model import LOADS, SATURATED, Block, Comparison
from loadtests.generator.load_result import LoadResult
from loadtests.report.findings import (
    GPU_MEMORY,
    LATENCIES,
    MEMORY,
    THROUGHPUT,
    TOP1,
    Change,
    Findings,
    Metric,
    Row,
    Tested,
    Verdict,
)
from loadtests.statistics import (
    MIN_BEYOND,
    Effect,
    Holm,
    holm,
    independent_proportions,
    paired_difference,
    paired_proportions,
    paired_ratio,
    percentile,
)
from service.manifest import Accuracy

Pairing = Literal["paired", "independent"]
"""Top-1 judged on the same images one by one, or as if each model had been given different images."""


def judge(comparison: Comparison, *, alpha: float = 0.05) -> Findings:
    """Compare every arm with the first; at most `alpha` of the reports on equal arms see any difference.

    Values are medians of the blocks' throughputs, percentiles of the latencies of all blocks, the largest peak of
    memory, and the manifest's top-1. Changes are those of the pairs of blocks that share a round: the mean ratio of
    their throughputs or peaks, the mean difference of their own percentiles. Where one round went very badly, a change
    may therefore differ from that of the values, and its interval is wide. See `loadtests.statistics`.
    """
    blocks = {arm.label: comparison.blocks_of(arm.label) for arm in comparison.plan.arms}
    baseline, *others = blocks.values()
    tested: list[Tested] = []
    for metric in [TOP1, THROUGHPUT, *latencies(comparison), GPU_MEMORY if all(uses_device(comparison)) else MEMORY]:
        first, *rows = (_row(label, metric, own) for label, own in blocks.items())
        tested.append((first, None))
        for row, own in zip(rows, others, strict=True):
            tested.append((replace(row, base=first.value), _effect(metric, own, baseline)))
    return Findings(rows=judged(tested, alpha))


def judged(tested: Sequence[Tested], alpha: float) -> list[Row]:
    """The rows with the verdicts on their effects, with Holm's levels over all of them."""
    tests = iter(holm([effect.p_value for _, effect in tested if effect], alpha))
    return [replace(row, change=_change(row.metric, effect, next(tests))) if effect else row for row, effect in tested]


def _change(metric: Metric, effect: Effect, test: Holm) -> Change:
    estimate, low, high = effect.at(test.level)
    none = 1.0 if metric.kind == "ratio" else 0.0
    verdict: Verdict = "no difference seen"
    # An exact test and its interval may disagree marginally: then no difference is seen.
    if test.rejected and not low <= none <= high:
        verdict = "better" if (low > none) == (metric.better == "higher") else "worse"
    return Change(estimate, low, high, level=test.level, p_value=test.p_value, verdict=verdict)


def uses_device(comparison: Comparison) -> set[bool]:
    """Whether memory of a GPU is known for blocks: for all (True), for none (False), or for some only (both)."""
    known = {
        any(load.device_bytes is not None for load in block.loads.values())
        for block in comparison.blocks
        if block.failure is None
    }
    return known or {False}


def block_value(block: Block, metric: Metric, *, min_beyond: int = MIN_BEYOND) -> float | None:
    """A metric of one block, None where it is unknown, or fewer than `min_beyond` samples lie beyond a percentile."""
    if metric == TOP1:
        return top1_percent(block.info)
    if metric in (MEMORY, GPU_MEMORY):
        peaks = ((load.peak_bytes if metric == MEMORY else load.device_bytes) or 0 for load in block.loads.values())
        return max(peaks, default=0) / 1e6 or None
    load = block.loads.get(metric.load or "")
    if load is None or metric.rank is None:
        return load.throughput if load else None
    if load.percentiles_ms:
        return load.percentiles_ms.get(metric.name)
    return percentile(load.latencies_ms, metric.rank, min_beyond=min_beyond)


def values_by_round(blocks: Sequence[Block], metric: Metric, *, min_beyond: int = MIN_BEYOND) -> dict[int, float]:
    """`block_value` of each block where it is known."""
    values = {block.round: block_value(block, metric, min_beyond=min_beyond) for block in blocks}
    return {number: value for number, value in values.items() if value is not None}


def ratio(values: dict[int, float], base: dict[int, float]) -> dict[int, float]:
    """Values divided round by round, in the rounds that have both."""
    return {number: value / base[number] for number, value in values.items() if base.get(number)}


def latencies(comparison: Comparison) -> list[Metric]:
    """Those of `LATENCIES` that were measured, labelled by the rate of their load."""
    return [
        replace(metric, label=f"{metric.label} at {load_name(comparison, metric.load)}")
        for metric in LATENCIES
        if metric.load in comparison.rates
    ]


def load_name(comparison: Comparison, load: str | None) -> str:
    """A load as a reader knows it: `340/s`, or `saturation`."""
    rate = comparison.rates.get(load or "")
    if rate is None:
        return "saturation" if load == SATURATED else str(load)
    # 170.0 per second is 170/s, 4.25 stays; never 1.7e+03.
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


def loads_of(comparison: Comparison) -> dict[tuple[str, str], list[LoadResult]]:
    """Results block by block, by arm and load, load by load; only what was measured."""
    return {
        (arm.label, name): found
        for name in LOADS
        for arm in comparison.plan.arms
        if (found := [block.loads[name] for block in comparison.blocks_of(arm.label) if name in block.loads])
    }


def counts(comparison: Comparison, label: str) -> dict[str, int]:
    """Blocks of an arm, measured to their end and failed, and its requests over all loads: due, errors, unsent."""
    blocks = comparison.blocks_of(label)
    loads = [load for block in blocks for load in block.loads.values()]
    return {
        "blocks": len(blocks),
        "failed_blocks": sum(block.arm == label for block in comparison.blocks) - len(blocks),
        "requests": sum(len(load.latencies_ms) for load in loads),
        "errors": sum(load.errors for load in loads),
        "unsent": sum(load.unsent_arrivals for load in loads),
    }


def model_info(comparison: Comparison, label: str) -> dict[str, Any]:
    """What the service said about an arm's model; empty if it never answered."""
    return next((block.info for block in comparison.blocks if block.arm == label and block.info), {})


def tokens_text(info: dict[str, Any]) -> str:
    """`16 of 64`: to how many of its tokens a model attends; empty if that is unknown."""
    known = info.get("kv_tokens") and info.get("tokens")
    return f"{info['kv_tokens']} of {info['tokens']}" if known else ""


def _row(arm: str, metric: Metric, blocks: Sequence[Block]) -> Row:
    known = values_by_round(blocks, metric).values()
    value: float | None = None
    if metric.rank is not None:
        value = percentile(_pooled(blocks, metric), metric.rank)
    elif known:
        value = max(known) if metric.unit == "MB" else float(np.median(list(known)))
    return Row(arm=arm, metric=metric, value=value, smallest=min(known, default=None), largest=max(known, default=None))


def _pooled(blocks: Sequence[Block], metric: Metric) -> npt.NDArray[np.float64]:
    loads = [block.loads[metric.load] for block in blocks if metric.load in block.loads]
    return np.concatenate([np.empty(0), *(load.latencies_ms for load in loads)])


def _effect(metric: Metric, arm: Sequence[Block], baseline: Sequence[Block]) -> Effect | None:
    if metric == TOP1:
        return compare_top1(arm[0].info, baseline[0].info)[0] if arm and baseline else None
    ours, theirs = (values_by_round(blocks, metric, min_beyond=0) for blocks in (arm, baseline))
    rounds = sorted(ours.keys() & theirs.keys())
    pairs = [ours[number] for number in rounds], [theirs[number] for number in rounds]
    if metric.kind == "ratio":
        return paired_ratio(*pairs)
    pools = [_pooled(blocks, metric) for blocks in (arm, baseline)]
    if any(percentile(pool, metric.rank or 0) is None for pool in pools):
        return None
    pooled = np.concatenate(pools)
    return paired_difference(*pairs, ceiling=max(pooled[np.isfinite(pooled)], default=math.inf))


def top1_percent(info: dict[str, Any]) -> float | None:
    """The manifest's top-1; None for random weights, and where the service says nothing about its model."""
    accuracy = info.get("accuracy")
    return 100 * float(accuracy["top1"]) if accuracy else None


def compare_top1(info: dict[str, Any], baseline: dict[str, Any]) -> tuple[Effect | None, Pairing | None]:
    """The difference in percentage points, from what the service says about two models, and how it was judged.

    None if they were tested on other sets.
    """
    ours, theirs = info.get("accuracy"), baseline.get("accuracy")
    if not ours or not theirs or any(ours.get(name) != theirs.get(name) for name in ("dataset", "split")):
        return None, None
    right, baseline_right = _right(ours), _right(theirs)
    labels = [(one.get("correct") or {}).get("labels_sha256") for one in (ours, theirs)]
    if right is None or baseline_right is None or labels[0] != labels[1]:
        return independent_proportions(ours["top1"], ours["n"], theirs["top1"], theirs["n"]), "independent"
    return paired_proportions(right, baseline_right), "paired"


def _right(accuracy: dict[str, Any]) -> npt.NDArray[np.bool_] | None:
    try:
        return Accuracy.model_validate(accuracy).correct_top1()
    except ValueError:
        return None
