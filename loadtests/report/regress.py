"""Has anything become worse since an earlier report? `compare --against results.json`, for CI.

The two runs share no rounds, so their blocks are compared unpaired (Welch's t on logarithms), with Holm's levels over
all arms and metrics, and a change counts only if it is also larger than a tolerance: between two days a machine changes
by more than its blocks do within one.

On the same kind of machine (CPU model and number of cores) the values themselves are compared, so that a slow-down of
the whole service is seen. On another one they would say nothing; there each arm's ratio to the baseline is compared,
round by round, if both runs have the same baseline: what made all arms slower is then not seen.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loadtests.experiment.model import HIGH, MODERATE, Block, Comparison
from loadtests.report.format import metric_name, scaled, unit
from loadtests.report.top1 import top1_effect, top1_percent
from loadtests.report.verdicts import METRICS, THROUGHPUT, TOP1, Metric, block_value, model_info, uses_device
from loadtests.statistics import MIN_ROUNDS, Effect, holm, unpaired_ratio

_SAME_RATE = 0.05
"""Latencies under loads whose rates differ by a larger share are not compared."""
_UNANSWERED = 2
"""Times the largest finite value of either run: what stands in for an infinite percentile."""


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A metric of an arm that has become worse."""

    arm: str
    metric: Metric
    name: str
    """The metric in words."""
    old: float
    """Median of the blocks; if `relative`, of their ratios to the baseline's."""
    new: float
    ratio: float
    """Ratio of the geometric means, new to old."""
    low: float
    high: float
    """Ends of the interval at `level`."""
    level: float
    p_value: float
    """Adjusted (Holm)."""
    relative: bool = False
    """Ratios to the baseline arm were compared, because the machines differ."""

    def __str__(self) -> str:
        """One sentence."""
        of = "of the baseline's" if self.relative else "%" if self.metric == TOP1 else unit(self.metric)
        old, new = (value if self.relative else scaled(self.metric, value) for value in (self.old, self.new))
        return (
            f"{self.arm}: {self.name} went from {old:.4g} to {new:.4g} {of}, "
            f"×{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f} at {self.level:.2%})."
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


def regressions(old: Comparison, new: Comparison, *, tolerance: float = 0.05, alpha: float = 0.05) -> Outcome:
    """What is worse in `new` by more than `tolerance` (0.05: 5 %), and not by chance; of top-1, any loss beyond chance.

    On equal services and an unchanged machine at most `alpha` of the calls find anything. An arm that had blocks in
    `old`, and all of whose blocks failed in `new`, comes first: its throughput is 0.
    """
    relative = _is_relative(old, new)
    found = {**_speeds(old, new, relative=relative), **_accuracies(old, new)}
    tests = holm([tested.effect.p_value for tested in found.values()], alpha)
    worse = []
    for ((arm, metric), (effect, was, now)), test in zip(found.items(), tests, strict=True):
        estimate, low, high = effect.at(test.level)
        if metric == TOP1:
            estimate, low, high = now / was, (was + low) / was, (was + high) / was
        fell = estimate < 1 if metric == TOP1 else max(estimate, 1 / estimate) > 1 + tolerance
        if test.rejected and fell and (estimate < 1) == (metric.better == "higher"):
            worse.append(
                Regression(
                    arm=arm,
                    metric=metric,
                    name=metric_name(new, metric),
                    old=was,
                    new=now,
                    ratio=estimate,
                    low=low,
                    high=high,
                    level=test.level,
                    p_value=test.p_value,
                    relative=relative and metric != TOP1,
                )
            )
    worse.sort(key=lambda regression: -abs(math.log(regression.ratio)))
    stopped = [
        _stopped(old, new, arm)
        for arm in _labels(old)
        if _measured(old, arm) and not _measured(new, arm) and _lost(new, arm)
    ]
    return Outcome(tests=len(tests) + len(stopped), worse=stopped + worse)


def _speeds(old: Comparison, new: Comparison, *, relative: bool) -> dict[tuple[str, Metric], _Tested]:
    found = {}
    for metric in _comparable(old, new):
        values = [_Values(run, metric, on_device=all(uses_device(new))) for run in (old, new)]
        ceiling = _UNANSWERED * max((*values[0].finite(), *values[1].finite()), default=1.0)
        for arm in _labels(old):
            was, now = (run.of(arm, ceiling, relative=relative) for run in values)
            effect = unpaired_ratio(now, was)
            if effect is not None and not (relative and arm == _labels(old)[0]):
                found[arm, metric] = _Tested(effect, float(np.median(was)), float(np.median(now)))
    return found


def _accuracies(old: Comparison, new: Comparison) -> dict[tuple[str, Metric], _Tested]:
    found = {}
    for arm in _labels(old):
        was, now = model_info(old, arm), model_info(new, arm)
        effect = top1_effect(now, was)
        if effect is not None:
            found[arm, TOP1] = _Tested(effect, top1_percent(was) or 0.0, top1_percent(now) or 0.0)
    return found


class _Values:
    """One metric of all measured blocks of a run."""

    def __init__(self, run: Comparison, metric: Metric, *, on_device: bool) -> None:
        self._baseline = _labels(run)[0]
        self._by_round: dict[str, dict[int, float]] = {
            label: {
                block.round: value
                for block in _measured(run, label)
                if (value := block_value(block, metric, on_device=on_device)) is not None
            }
            for label in _labels(run)
        }

    def finite(self) -> list[float]:
        return [value for own in self._by_round.values() for value in own.values() if math.isfinite(value)]

    def of(self, label: str, ceiling: float, *, relative: bool) -> list[float]:
        """An arm's values, or their ratios to the baseline's in the rounds that have both."""
        own, base = self._by_round.get(label, {}), self._by_round[self._baseline]
        if not relative:
            return [min(value, ceiling) for value in own.values()]
        return [min(value, ceiling) / min(base[at], ceiling) for at, value in own.items() if base.get(at)]


def notes(old: Comparison, new: Comparison) -> list[str]:
    """What a reader of the regressions must know: other machines, missing arms, what was not compared."""
    said = [
        f"The conditions differ: {name} was {was} and is {now}."
        for name, was, now in zip(_CONDITIONS, _conditions(old), _conditions(new), strict=True)
        if was != now
    ]
    baseline, both = _labels(new)[0], [arm for arm in _labels(old) if arm in _labels(new)]
    if machines := _machines(old, new):
        how = (
            f"ratios to {baseline} were compared, which do not show what made all arms slower"
            if _is_relative(old, new)
            else "the values themselves were compared, because the baselines differ too: do not rely on them"
        )
        said.append(f"The machines differ ({machines}): {how}.")
    elif _labels(old)[0] == baseline and (slower := _slower(old, new, baseline)) > _SAME_RATE:
        said.append(
            f"The baseline {baseline} itself answers {slower:.0%} fewer images/s at saturation: "
            "if it was not changed, the machine was slower."
        )
    for where, one, other in (("old", old, new), ("new", new, old)):
        if missing := [arm for arm in _labels(one) if arm not in _labels(other)]:
            said.append(f"Not compared, because only in the {where} results: {', '.join(missing)}.")
    for name in (MODERATE, HIGH):
        rates = old.rates.get(name), new.rates.get(name)
        if any(rates) and not any(metric.load == name for metric in _comparable(old, new)):
            was, now = ("unknown" if rate is None else f"{rate:g}/s" for rate in rates)
            said.append(f"Latencies under the {name} load were not compared: its rate was {was} and is {now}.")
    said += [
        f"{lost} blocks of {arm} failed or answered nothing, and {_lost(old, arm)} in the old results: "
        "they were not compared."
        for arm in both
        if (lost := _lost(new, arm))
    ]
    if few := [arm for arm in both if min(len(_measured(run, arm)) for run in (old, new)) < MIN_ROUNDS]:
        said.append(f"Not compared, with fewer than {MIN_ROUNDS} measured blocks in one of them: {', '.join(few)}.")
    return said


_CONDITIONS = ("protocol", "connections", "warmup_seconds", "service_arguments", "payloads")
"""What must be the same for values to be comparable."""


def _conditions(run: Comparison) -> list[object]:
    return [run.payloads if name == "payloads" else getattr(run.plan, name) for name in _CONDITIONS]


def _labels(run: Comparison) -> list[str]:
    return [arm.label for arm in run.plan.arms]


def _measured(run: Comparison, label: str) -> list[Block]:
    """Blocks measured to their end; a server that lived and answered nothing failed as well."""
    return [block for block in run.blocks_of(label) if block_value(block, THROUGHPUT) != 0]


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
    return [metric for metric in METRICS if metric != TOP1 and (metric.rank is None or metric.load in same)]


def _throughput(run: Comparison, label: str) -> float:
    values = [value for block in _measured(run, label) if (value := block_value(block, THROUGHPUT))]
    return float(np.median(values)) if values else 0.0


def _slower(old: Comparison, new: Comparison, label: str) -> float:
    """The share of the old throughput that is gone."""
    was, now = _throughput(old, label), _throughput(new, label)
    return 1 - now / was if was and now else 0.0


def _stopped(old: Comparison, new: Comparison, label: str) -> Regression:
    return Regression(
        arm=label,
        metric=THROUGHPUT,
        name=metric_name(new, THROUGHPUT),
        old=_throughput(old, label),
        new=0.0,
        ratio=0.0,
        low=0.0,
        high=0.0,
        level=1.0,
        p_value=0.0,
    )
