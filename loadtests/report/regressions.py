"""Has anything become worse since an earlier report? `compare --against results.json`, for CI.

The two runs share no rounds, so their blocks are compared unpaired (Welch's t on logarithms), with Holm's levels over
all arms and metrics, and a change counts only if it is also larger than a tolerance: between two days a machine changes
by more than its blocks do within one.

On the same kind of machine (CPU model and number of cores) the values themselves are compared, so that a slow-down of
the whole service is seen. On another one they would say nothing; there each arm's ratio to the baseline is compared,
round by round, if both runs have the same baseline: what made all arms slower is then not seen.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from loadtests.experiment.model import Comparison
from loadtests.report import verdicts
from loadtests.report.findings import GPU_MEMORY, MEMORY, THROUGHPUT, TOP1, Metric, Row, Tested
from loadtests.report.rendering import median, sentences
from loadtests.report.verdicts import counts, model_info, values_by_round
from loadtests.statistics import MIN_ROUNDS, Effect, unpaired_ratio

_SAME_RATE = 0.05
"""Latencies under loads whose rates differ by a larger share are not compared."""
_UNANSWERED = 2
"""Times the largest finite value of either run: what stands in for an infinite percentile."""
_CONDITIONS = ("protocol", "connections", "warmup_seconds", "service_arguments")
"""What must be the same in both plans for values to be comparable."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How much was compared, and what became worse."""

    tests: int
    """Metrics of arms that could be compared; with none, nothing is known."""
    worse: list[Row]
    """The largest change first: medians of the blocks, and the ratio of the geometric means; of top-1, points."""


def find_regressions(old: Comparison, new: Comparison, *, tolerance: float = 0.05, alpha: float = 0.05) -> Outcome:
    """What is worse in `new` by more than `tolerance` (0.05: 5 %), and not by chance; of top-1, any loss beyond chance.

    On equal services and an unchanged machine at most `alpha` of the calls find anything. An arm that had blocks in
    `old`, and all of whose blocks failed in `new`, comes first: its throughput is 0.
    """
    old, new = _answering(old), _answering(new)
    rows = verdicts.judged([*_stopped(old, new), *_speeds(old, new), *_accuracies(old, new)], alpha)
    least, most = 1 / (1 + tolerance), 1 + tolerance
    worse = [
        row
        for row in rows
        if row.change and row.verdict == "worse" and (row.metric == TOP1 or not least <= row.change.estimate <= most)
    ]
    worse.sort(key=lambda row: -abs(math.log(row.value / row.base)) if row.value and row.base else -math.inf)
    return Outcome(tests=len(rows), worse=worse)


def sentence(row: Row) -> str:
    """How a metric of an arm has become worse."""
    return sentences("regression.txt.j2", row=row)[0]


def _stopped(old: Comparison, new: Comparison) -> Iterator[Tested]:
    """Arms that no longer work."""
    for arm in _labels(old):
        before, after = counts(old, arm), counts(new, arm)
        if before["blocks"] and after["failed_blocks"] and not after["blocks"]:
            row = Row(arm=arm, metric=THROUGHPUT, value=0.0, base=_throughput(old, arm))
            yield row, Effect(centre=-math.inf, error=0.0, ratio=True)


def _speeds(old: Comparison, new: Comparison) -> Iterator[Tested]:
    """All metrics but top-1; ratios to the baseline if the machines differ."""
    baseline, relative = _labels(old)[0], _is_relative(old, new)
    for metric in _comparable(old, new):
        runs = [{arm: values_by_round(run.blocks_of(arm), metric) for arm in _labels(run)} for run in (old, new)]
        finite = [value for run in runs for own in run.values() for value in own.values() if math.isfinite(value)]
        ceiling = _UNANSWERED * max(finite, default=1.0)
        runs = [{arm: {at: min(own[at], ceiling) for at in own} for arm, own in run.items()} for run in runs]
        compared = replace(metric, kind="ratio")
        if relative:
            compared = replace(compared, unit="of the baseline's")
            others = _labels(old)[1:]
            runs = [{arm: verdicts.ratio(run[arm], run[baseline]) for arm in others if arm in run} for run in runs]
        for arm in runs[0]:
            was, now = (list(run.get(arm, {}).values()) for run in runs)
            if effect := unpaired_ratio(now, was):
                row = Row(arm=arm, metric=compared, value=float(np.median(now)), base=float(np.median(was)))
                yield row, effect


def _accuracies(old: Comparison, new: Comparison) -> Iterator[Tested]:
    for arm in _labels(old):
        was, now = model_info(old, arm), model_info(new, arm)
        values = {"value": verdicts.top1_percent(now), "base": verdicts.top1_percent(was)}
        if effect := verdicts.compare_top1(now, was)[0]:
            yield Row(arm=arm, metric=TOP1, **values), effect


def notes(old: Comparison, new: Comparison) -> list[str]:
    """What a reader of the regressions must know: other machines, missing arms, what was not compared."""
    old, new = _answering(old), _answering(new)
    olds, news = _labels(old), _labels(new)
    was, now = (_throughput(run, news[0]) for run in (old, new))
    slower = 1 - now / was if was and now and olds[0] == news[0] else 0.0
    measured = {arm: (counts(old, arm), counts(new, arm)) for arm in olds if arm in news}
    return sentences(
        "regression_notes.txt.j2",
        old=old,
        new=new,
        conditions=_CONDITIONS,
        machines=_machines(old, new),
        relative=_is_relative(old, new),
        baseline=news[0],
        slower=slower if slower > _SAME_RATE else 0.0,
        olds=olds,
        news=news,
        comparable={metric.load for metric in _comparable(old, new)},
        counts=measured,
        few=[arm for arm, runs in measured.items() if min(run["blocks"] for run in runs) < MIN_ROUNDS],
        min_rounds=MIN_ROUNDS,
    )


def _labels(run: Comparison) -> list[str]:
    return [arm.label for arm in run.plan.arms]


def _answering(run: Comparison) -> Comparison:
    """A server that lived and answered nothing failed as well."""
    blocks = []
    for block in run.blocks:
        silent = verdicts.block_value(block, THROUGHPUT) == 0
        blocks.append(replace(block, failure="it answered nothing") if silent else block)
    return replace(run, blocks=blocks)


def _machines(old: Comparison, new: Comparison) -> str:
    """How they differ."""
    pairs = [(name, old.environment.get(name), new.environment.get(name)) for name in ("cpu", "cores")]
    return "; ".join(f"{name}: {was} and {now}" for name, was, now in pairs if was != now)


def _is_relative(old: Comparison, new: Comparison) -> bool:
    return bool(_machines(old, new)) and _labels(old)[0] == _labels(new)[0]


def _comparable(old: Comparison, new: Comparison) -> list[Metric]:
    """The metrics that were measured under the same load; not top-1."""
    same = {
        name
        for name in old.rates.keys() & new.rates.keys()
        if abs(math.log(new.rates[name] / old.rates[name])) <= math.log1p(_SAME_RATE)
    }
    latencies = [metric for metric in verdicts.latencies(new) if metric.load in same]
    return [THROUGHPUT, *latencies, MEMORY, GPU_MEMORY]


def _throughput(run: Comparison, label: str) -> float:
    return median(values_by_round(run.blocks_of(label), THROUGHPUT).values()) or 0.0
