"""Has anything become worse since an earlier report? `compare --against results.json`, for CI.

The two runs share no rounds, so their blocks are compared unpaired (Welch's t on logarithms), with Holm's levels over
all arms and metrics, and a change counts only if it is also larger than a tolerance: between two days a machine changes
by more than its blocks do within one.

On the same kind of machine (CPU model and number of cores) the values themselves are compared, so that a slow-down of
the whole service is seen. On another one they would say nothing; there each arm's ratio to the baseline is compared,
round by round, if both runs have the same baseline: what made all arms slower is then not seen.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from loadtests.experiment.model import HIGH, MODERATE, Block, Comparison
from loadtests.report import verdicts
from loadtests.report.format import change_texts
from loadtests.report.rendering import median, sentences
from loadtests.report.verdicts import THROUGHPUT, TOP1, Change, Metric, model_info, top1_percent, values_by_round
from loadtests.statistics import MIN_ROUNDS, Effect, unpaired_ratio

_SAME_RATE = 0.05
"""Latencies under loads whose rates differ by a larger share are not compared."""
_UNANSWERED = 2
"""Times the largest finite value of either run: what stands in for an infinite percentile."""
_CONDITIONS = ("protocol", "connections", "warmup_seconds", "service_arguments")
"""What must be the same in both plans for values to be comparable."""
_STOPPED = Effect(centre=-math.inf, error=0.0, ratio=True)
"""Of an arm that no longer works."""


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A metric of an arm that has become worse."""

    arm: str
    metric: Metric
    old: float
    """Median of the blocks; if `relative`, of their ratios to the baseline's."""
    new: float
    change: Change
    """Ratio of the geometric means, new to old; of top-1, the difference in points."""
    relative: bool = False
    """Ratios to the baseline arm were compared, because the machines differ."""

    def __str__(self) -> str:
        """One sentence."""
        of = " of the baseline's" if self.relative else f" {self.metric.unit}".rstrip()
        change, interval = change_texts(self.metric, self.change)
        return (
            f"{self.arm}: {self.metric.label} went from {self.old:.4g} to {self.new:.4g}{of}, "
            f"{change} ({interval} at {self.change.level:.2%})."
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How much was compared, and what became worse."""

    tests: int
    """Metrics of arms that could be compared; with none, nothing is known."""
    worse: list[Regression]
    """The largest change first."""


class _Tested(NamedTuple):
    effect: Effect
    old: float
    new: float
    relative: bool = False


_Tests = dict[tuple[str, Metric], _Tested]


def find_regressions(old: Comparison, new: Comparison, *, tolerance: float = 0.05, alpha: float = 0.05) -> Outcome:
    """What is worse in `new` by more than `tolerance` (0.05: 5 %), and not by chance; of top-1, any loss beyond chance.

    On equal services and an unchanged machine at most `alpha` of the calls find anything. An arm that had blocks in
    `old`, and all of whose blocks failed in `new`, comes first: its throughput is 0.
    """
    stopped: _Tests = {
        (arm, THROUGHPUT): _Tested(_STOPPED, _throughput(old, arm), 0.0)
        for arm in _labels(old)
        if _measured(old, arm) and not _measured(new, arm) and _lost(new, arm)
    }
    tested = {**stopped, **_speeds(old, new), **_accuracies(old, new)}
    changes = verdicts.changes({key: test.effect for key, test in tested.items()}, alpha)
    worse = [
        Regression(arm=arm, metric=metric, old=was, new=now, change=changes[arm, metric], relative=relative)
        for (arm, metric), (_, was, now, relative) in tested.items()
        if changes[arm, metric].verdict == "worse"
        and (metric == TOP1 or not 1 / (1 + tolerance) <= changes[arm, metric].estimate <= 1 + tolerance)
    ]
    worse.sort(key=lambda one: -abs(math.log(one.new / one.old)) if one.new else -math.inf)
    return Outcome(tests=len(tested), worse=worse)


def _speeds(old: Comparison, new: Comparison) -> _Tests:
    """All metrics but top-1, as ratios."""
    found, relative = {}, _is_relative(old, new)
    arms, baseline = (_labels(old)[1:], _labels(old)[0]) if relative else (_labels(old), None)
    for metric in _comparable(old, new):
        runs = [{arm: values_by_round(_measured(run, arm), metric) for arm in _labels(run)} for run in (old, new)]
        every = [value for run in runs for own in run.values() for value in own.values()]
        ceiling = _UNANSWERED * max(filter(math.isfinite, every), default=1.0)
        for arm in arms:
            was, now = (_values(run, arm, ceiling, baseline) for run in runs)
            if effect := unpaired_ratio(now, was):
                key = arm, replace(metric, kind="ratio")
                found[key] = _Tested(effect, float(np.median(was)), float(np.median(now)), relative)
    return found


def _values(run: dict[str, dict[int, float]], arm: str, ceiling: float, baseline: str | None) -> list[float]:
    """An arm's values by round, or their ratios to the baseline's in the rounds that have both."""
    own = {number: min(value, ceiling) for number, value in run.get(arm, {}).items()}
    base = {number: min(value, ceiling) for number, value in run[baseline].items()} if baseline else {}
    return [value / base[number] for number, value in own.items() if base.get(number)] if baseline else [*own.values()]


def _accuracies(old: Comparison, new: Comparison) -> _Tests:
    found = {}
    for arm in _labels(old):
        was, now = model_info(old, arm), model_info(new, arm)
        if effect := verdicts.compare_top1(now, was)[0]:
            found[arm, TOP1] = _Tested(effect, top1_percent(was) or 0.0, top1_percent(now) or 0.0)
    return found


def notes(old: Comparison, new: Comparison) -> list[str]:
    """What a reader of the regressions must know: other machines, missing arms, what was not compared."""
    conditions = {name: (getattr(old.plan, name), getattr(new.plan, name)) for name in _CONDITIONS}
    olds, news, comparable = _labels(old), _labels(new), {metric.load for metric in _comparable(old, new)}
    both = [arm for arm in olds if arm in news]
    was, now = _throughput(old, news[0]), _throughput(new, news[0])
    slower = 1 - now / was if was and now and olds[0] == news[0] else 0.0
    rates = {name: (old.rates.get(name), new.rates.get(name)) for name in (MODERATE, HIGH) if name not in comparable}
    return sentences(
        "regression_notes.txt.j2",
        conditions={**conditions, "payloads": (old.payloads, new.payloads)},
        machines=_machines(old, new),
        relative=_is_relative(old, new),
        baseline=news[0],
        slower=slower if slower > _SAME_RATE else 0.0,
        missing={
            "old": [arm for arm in olds if arm not in news],
            "new": [arm for arm in news if arm not in olds],
        },
        other_rates={name: pair for name, pair in rates.items() if any(pair)},
        lost={arm: (_lost(old, arm), _lost(new, arm)) for arm in both},
        few=[arm for arm in both if min(len(_measured(run, arm)) for run in (old, new)) < MIN_ROUNDS],
        min_rounds=MIN_ROUNDS,
    )


def _labels(run: Comparison) -> list[str]:
    return [arm.label for arm in run.plan.arms]


def _measured(run: Comparison, label: str) -> list[Block]:
    """Blocks measured to their end; a server that lived and answered nothing failed as well."""
    return [block for block in run.blocks_of(label) if verdicts.block_value(block, THROUGHPUT) != 0]


def _lost(run: Comparison, label: str) -> int:
    return sum(block.arm == label for block in run.blocks) - len(_measured(run, label))


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
    return [THROUGHPUT, *latencies, verdicts.MEMORY, verdicts.GPU_MEMORY]


def _throughput(run: Comparison, label: str) -> float:
    return median(values_by_round(_measured(run, label), THROUGHPUT).values()) or 0.0
