"""Has anything become worse since an earlier report? `compare --against results.json`, for CI.

The two runs share no rounds, so their blocks are compared unpaired (Welch's t on logarithms), with Holm's levels over
all arms and metrics, and a change counts only if it is also larger than a tolerance: between two days a machine changes
by more than its blocks do within one.

On the same kind of machine (CPU model and number of cores) the values themselves are compared, so that a slow-down of
the whole service is seen. On another one they would say nothing; there each arm's ratio to the baseline is compared,
round by round, if both runs have the same baseline: whatever made all arms slower is then not seen.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from loadtests.experiment.model import Comparison
from loadtests.report import verdicts
from loadtests.report.findings import GPU_MEMORY, MEMORY, THROUGHPUT, TOP1, Row, Tested
from loadtests.report.rendering import median, sentences
from loadtests.report.verdicts import counts, model_info, values_by_round
from loadtests.statistics import MIN_ROUNDS, Effect, unpaired_ratio

_SAME_RATE = 0.05
"""Latencies under loads whose rates differ by a larger share are not compared."""
_UNANSWERED = 2
"""An infinite percentile counts as this many times the largest finite value of the arms in both runs."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How much was compared, and what became worse."""

    tests: int
    """Metrics of arms that could be compared; with none, nothing is known."""
    worse: list[Row]
    """The largest change first. Values are medians of the blocks, or of ratios to the baseline's on another machine."""


def find_regressions(old: Comparison, new: Comparison, *, tolerance: float = 0.05, alpha: float = 0.05) -> Outcome:
    """What is worse in `new` by more than `tolerance` (0.05: 5 %), and not by chance; of top-1, any loss beyond chance.

    On equal services and an unchanged machine at most `alpha` of the calls find anything. An arm that had blocks in
    `old`, and all of whose blocks failed in `new`, comes first: its throughput is 0.
    """
    runs = _Runs(old, new)
    rows = verdicts.judged([*_arms(runs), *_speeds(runs)], alpha)
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


def notes(old: Comparison, new: Comparison) -> list[str]:
    """What a reader of the regressions must know: other machines, missing arms, what was not compared."""
    runs = _Runs(old, new)
    counted = {arm: [counts(run, arm) for run in (runs.old, runs.new)] for arm in runs.arms}
    return sentences(
        "regression_notes.txt.j2",
        runs=runs,
        counts=counted,
        few=[arm for arm, both in counted.items() if min(one["blocks"] for one in both) < MIN_ROUNDS],
        min_rounds=MIN_ROUNDS,
        same_rate=_SAME_RATE,
    )


class _Runs:
    """Two runs and what they have in common; a server that stayed alive but answered nothing counts as failed, too."""

    def __init__(self, old: Comparison, new: Comparison) -> None:
        self.old, self.new = _answering(old), _answering(new)
        self.olds, self.news = ([arm.label for arm in run.plan.arms] for run in (old, new))
        self.arms = [arm for arm in self.olds if arm in self.news]
        facts = [(name, old.environment.get(name), new.environment.get(name)) for name in ("cpu", "cores")]
        self.machines = "; ".join(f"{name}: {was} and {now}" for name, was, now in facts if was != now)
        self.same_baseline = self.olds[0] == self.news[0]
        self.relative = bool(self.machines) and self.same_baseline
        """Whether ratios to the baseline are compared."""
        factors = {load: new.rates[load] / rate for load, rate in old.rates.items() if load in new.rates}
        self.loads = {load for load, factor in factors.items() if abs(math.log(factor)) <= math.log1p(_SAME_RATE)}
        """Open loops under which latencies are compared."""
        self.throughputs = [_throughput(run, self.news[0]) for run in (self.old, self.new)]
        """Throughputs of the new baseline in both runs."""


def _answering(run: Comparison) -> Comparison:
    silent = [verdicts.block_value(block, THROUGHPUT) == 0 for block in run.blocks]
    pairs = zip(run.blocks, silent, strict=True)
    return replace(run, blocks=[replace(block, failure="no answers") if one else block for block, one in pairs])


def _throughput(run: Comparison, label: str) -> float:
    return median(values_by_round(run.blocks_of(label), THROUGHPUT).values()) or 0.0


def _arms(runs: _Runs) -> Iterator[Tested]:
    """Arms that no longer work, and top-1."""
    for arm in runs.arms:
        before, after = counts(runs.old, arm), counts(runs.new, arm)
        if before["blocks"] and after["failed_blocks"] and not after["blocks"]:
            row = Row(arm=arm, metric=THROUGHPUT, value=0.0, base=_throughput(runs.old, arm))
            yield row, Effect(centre=-math.inf, error=0.0, ratio=True)
        was, now = model_info(runs.old, arm), model_info(runs.new, arm)
        if effect := verdicts.compare_top1(now, was)[0]:
            row = Row(arm=arm, metric=TOP1, value=verdicts.top1_percent(now), base=verdicts.top1_percent(was))
            yield row, effect


def _speeds(runs: _Runs) -> Iterator[Tested]:
    """All metrics but top-1, as ratios."""
    latencies = [metric for metric in verdicts.latencies(runs.new) if metric.load in runs.loads]
    for metric in (THROUGHPUT, *latencies, MEMORY, GPU_MEMORY):
        both = [{arm: values_by_round(run.blocks_of(arm), metric) for arm in runs.arms} for run in (runs.old, runs.new)]
        finite = [value for run in both for own in run.values() for value in own.values() if math.isfinite(value)]
        ceiling = _UNANSWERED * max(finite, default=1.0)
        both = [{arm: {at: min(own[at], ceiling) for at in own} for arm, own in run.items()} for run in both]
        compared = replace(metric, kind="ratio")
        if runs.relative:
            compared = replace(compared, unit="of the baseline's")
            both = [{arm: verdicts.ratio(own, run[runs.arms[0]]) for arm, own in run.items()} for run in both]
        for arm in runs.arms[1:] if runs.relative else runs.arms:
            was, now = (list(run[arm].values()) for run in both)
            if effect := unpaired_ratio(now, was):
                row = Row(arm=arm, metric=compared, value=float(np.median(now)), base=float(np.median(was)))
                yield row, effect
