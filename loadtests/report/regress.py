"""Has anything become worse since an earlier report? `compare --against results.json`, for CI.

The two runs share no rounds, so their blocks are compared unpaired (Welch's t on logarithms), with Holm's levels over
all arms and figures, and a change counts only if it is also larger than a tolerance: between two days a machine changes
by more than its blocks do within one.

On the same kind of machine (CPU model and number of cores) the figures themselves are compared, so that a slow-down of
the whole service is seen. On another one they would say nothing; there each arm's ratio to the baseline is compared,
round by round, if both runs have the same baseline: what made all arms slower is then not seen.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.experiment.json_files import to_json
from loadtests.experiment.model import HIGH, MODERATE, SATURATED, Comparison
from loadtests.report.verdicts import block_figure
from loadtests.statistics import (
    MIN_BEYOND,
    MIN_ROUNDS,
    Effect,
    difference_of_shares,
    holm,
    unpaired_ratio,
)

SCHEMA_VERSION = 3
"""Of the results.json that can be read."""
TOP1 = "top1"
UNITS = {
    "throughput": "images/s",
    **{f"{name}_p{rank}": "ms" for name in (MODERATE, HIGH) for rank in (50, 95, 99)},
    "peak_bytes": "bytes",
    TOP1: "of the images",
}
"""Of the figures that are compared, by the keys of `loadtests.report.verdicts.Metric`."""
_CONDITIONS = ("protocol", "connections", "warmup_seconds", "service_arguments")
_SAME_RATE = 0.05
"""Latencies under loads whose rates differ by a larger share are not compared."""
_UNANSWERED = 2
"""Times the largest finite figure of either run: what stands in for an infinite percentile."""

_Rounds = dict[int, float]


class ResultsError(Exception):
    """A results.json that cannot be used; the message says which and what to do."""


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A figure of an arm that has become worse."""

    arm: str
    key: str
    """Of the metric: throughput, moderate_p50, ..., peak_bytes."""
    old: float
    """Median of the blocks in the unit of `UNITS`; if `relative`, of their ratios to the baseline's."""
    new: float
    ratio: float
    """New by old; geometric means."""
    low: float
    high: float
    """Interval at `level`."""
    level: float
    p_value: float
    """Adjusted (Holm)."""
    relative: bool = False
    """Of ratios to the baseline arm, because the machines differ."""

    def __str__(self) -> str:
        """One sentence."""
        unit = "of the baseline's" if self.relative else UNITS[self.key]
        return (
            f"{self.arm}: {self.key} went from {self.old:.4g} to {self.new:.4g} {unit}, "
            f"×{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f} at {self.level:.2%})."
        )


def read(path: Path) -> dict[str, Any]:
    """The results of an earlier `compare`. Raises ResultsError if it is not one, or of another version."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(
            f"cannot read {path}: {error.strerror}; give the results.json of an earlier compare"
        ) from error
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON ({error}); give the results.json of an earlier compare") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION or not {"arms", "blocks", "environment"} <= document.keys():
        raise ResultsError(
            f"{path} is no results.json of compare in version {SCHEMA_VERSION} (its schema_version is {version}); "
            "measure the old state again with `python -m loadtests compare`"
        )
    return dict(document)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was compared, and what of it is worse."""

    tests: int
    """Figures of arms that could be compared; with none, nothing is known."""
    worse: list[Regression]
    """The largest change first."""


def regressions(
    old: dict[str, Any], new: Comparison | dict[str, Any], *, tolerance: float = 0.05, alpha: float = 0.05
) -> Outcome:
    """What is worse in `new` by more than `tolerance` (0.05: 5 %), and not by chance; of top-1, any loss beyond chance.

    On equal services and an unchanged machine at most `alpha` of the calls find anything. An arm that had blocks in
    `old`, and all of whose blocks failed in `new`, comes first: its throughput is 0. Raises KeyError or TypeError if a
    document is not laid out as `compare` writes it.
    """
    before, after = _Run.of(old), _Run.of(new)
    relative = _is_relative(before, after)
    found = {**_speeds(before, after, relative=relative), **_accuracies(before, after)}
    tests = holm([effect.p_value for effect, _, _ in found.values()], alpha)
    worse = []
    for ((arm, key), (effect, was, now)), test in zip(found.items(), tests, strict=True):
        estimate, low, high = effect.at(test.level)
        ratio, low, high = (estimate, low, high) if effect.ratio else (now / was, (was + low) / was, (was + high) / was)
        fell = ratio < 1 if key == TOP1 else (1 / ratio if key == "throughput" else ratio) > 1 + tolerance
        if test.rejected and fell:
            worse.append(
                Regression(
                    arm=arm,
                    key=key,
                    old=was,
                    new=now,
                    ratio=ratio,
                    low=low,
                    high=high,
                    level=test.level,
                    p_value=test.p_value,
                    relative=relative and key != TOP1,
                )
            )
    worse.sort(key=lambda regression: -abs(math.log(regression.ratio)))
    stopped = [_stopped(before, arm) for arm in before.arms if before.blocks(arm) and arm in after.failing]
    return Outcome(tests=len(tests) + len(stopped), worse=stopped + worse)


_Found = dict[tuple[str, str], tuple[Effect, float, float]]
"""By arm and key: the effect, and what the figure was and is."""


def _speeds(before: "_Run", after: "_Run", *, relative: bool) -> _Found:
    found: _Found = {}
    for key in _comparable(before, after):
        ceiling = _UNANSWERED * max((*before.finite(key), *after.finite(key)), default=1.0)
        for arm in before.arms:
            was, now = (run.by_round(arm, key, ceiling, relative=relative) for run in (before, after))
            effect = unpaired_ratio(list(now.values()), list(was.values()))
            if effect is not None and not (relative and arm == before.baseline):
                found[arm, key] = (effect, float(np.median(list(was.values()))), float(np.median(list(now.values()))))
    return found


def _accuracies(before: "_Run", after: "_Run") -> _Found:
    found: _Found = {}
    for arm in before.arms:
        was, now = before.accuracy.get(arm), after.accuracy.get(arm)
        if was and now and (was["dataset"], was["split"]) == (now["dataset"], now["split"]):
            effect = difference_of_shares(now["top1"], now["n"], was["top1"], was["n"])
            if effect is not None:
                found[arm, TOP1] = (effect, was["top1"], now["top1"])
    return found


def notes(old: dict[str, Any], new: Comparison | dict[str, Any]) -> list[str]:
    """What a reader of the regressions must know: other machines, missing arms, what was not compared."""
    before, after = _Run.of(old), _Run.of(new)
    said = [
        f"The conditions differ: {name} was {before.conditions[name]} and is {now}."
        for name, now in after.conditions.items()
        if before.conditions[name] != now
    ]
    if machines := _machines(before, after):
        how = (
            f"ratios to {after.baseline} were compared, which do not show what made all arms slower"
            if _is_relative(before, after)
            else "the figures themselves were compared, because the baselines differ too: do not rely on them"
        )
        said.append(f"The machines differ ({machines}): {how}.")
    elif before.baseline == after.baseline and (change := _slower(before, after)) > _SAME_RATE:
        said.append(
            f"The baseline {after.baseline} itself answers {change:.0%} fewer images/s at saturation: "
            "if it was not changed, the machine was slower."
        )
    for where, one, other in (("old", before, after), ("new", after, before)):
        if missing := [arm for arm in one.arms if arm not in other.arms]:
            said.append(f"Not compared, as only in the {where} results: {', '.join(missing)}.")
    for name in (MODERATE, HIGH):
        rates = before.rates.get(name), after.rates.get(name)
        if any(rates) and f"{name}_p50" not in _comparable(before, after):
            was, now = ("unknown" if rate is None else f"{rate:g}/s" for rate in rates)
            said.append(f"Latencies under the {name} load were not compared: its rate was {was} and is {now}.")
    both = [arm for arm in before.arms if arm in after.arms]
    said += [
        f"{after.lost[arm]} blocks of {arm} failed or answered nothing, and {before.lost[arm]} in the old results: "
        "they were not compared."
        for arm in both
        if after.lost[arm]
    ]
    if few := [arm for arm in both if min(before.blocks(arm), after.blocks(arm)) < MIN_ROUNDS]:
        said.append(f"Not compared, with fewer than {MIN_ROUNDS} measured blocks in one of them: {', '.join(few)}.")
    return said


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What is compared of a comparison, wherever it comes from."""

    arms: list[str]
    rates: dict[str, float]
    environment: dict[str, str]
    figures: dict[tuple[str, str], _Rounds]
    """By arm and key; of blocks that were measured to their end."""
    failing: list[str]
    """Arms of whose blocks all failed."""
    lost: dict[str, int]
    """Blocks that failed, by arm."""
    accuracy: dict[str, dict[str, Any]]
    """By arm: dataset, split, n and top1 of its manifest."""
    conditions: dict[str, Any]
    """Of the plan, what must be the same for figures to be comparable."""

    @classmethod
    def of(cls, source: Comparison | dict[str, Any]) -> "_Run":
        infos: dict[str, Any]
        plan: dict[str, Any]
        payloads: str | None
        if isinstance(source, Comparison):
            arms, rates, environment = [arm.label for arm in source.plan.arms], source.rates, source.environment
            blocks = [
                (block.arm, block.round, block.failure, {key: block_figure(block, key) for key in UNITS if key != TOP1})
                for block in source.blocks
            ]
            infos = {block.arm: block.info for block in source.blocks if block.info}
            plan = to_json(source.plan)
            payloads = source.payloads
        else:
            arms, rates = [arm["label"] for arm in source["arms"]], source.get("rates", {})
            environment = source["environment"]
            blocks = [
                (block["arm"], block["round"], block["failure"], _written(block["loads"])) for block in source["blocks"]
            ]
            infos, plan, payloads = source.get("info", {}), source.get("plan", {}), source.get("payloads")
        accuracy = {arm: info["accuracy"] for arm, info in infos.items() if info and info.get("accuracy")}
        conditions = {name: plan.get(name) for name in _CONDITIONS} | {"payloads": payloads}
        figures: dict[tuple[str, str], _Rounds] = {}
        lost = dict.fromkeys(arms, 0)
        for arm, number, failure, values in blocks:
            # A server that lived and answered nothing has failed as well; and zero has no logarithm.
            if failure is not None or values["throughput"] == 0:
                lost[arm] += 1
                continue
            for key, value in values.items():
                if value is not None:
                    figures.setdefault((arm, key), {})[number] = value
        measured = {arm for arm, _ in figures}
        return cls(
            arms=arms,
            rates=rates,
            environment=environment,
            figures=figures,
            lost=lost,
            accuracy=accuracy,
            conditions=conditions,
            failing=[arm for arm in arms if lost[arm] and arm not in measured],
        )

    @property
    def baseline(self) -> str:
        return self.arms[0]

    def blocks(self, arm: str) -> int:
        return len(self.figures.get((arm, "throughput"), {}))

    def finite(self, key: str) -> list[float]:
        """This figure of all blocks of all arms."""
        every = [value for (_, name), values in self.figures.items() if name == key for value in values.values()]
        return [value for value in every if math.isfinite(value)]

    def by_round(self, arm: str, key: str, ceiling: float, *, relative: bool) -> _Rounds:
        """The arm's figure, or its ratio to the baseline's in the rounds that have both."""
        mine = {number: min(value, ceiling) for number, value in self.figures.get((arm, key), {}).items()}
        if not relative:
            return mine
        base = self.by_round(self.baseline, key, ceiling, relative=False)
        return {number: value / base[number] for number, value in mine.items() if base.get(number)}


def _written(loads: dict[str, Any]) -> dict[str, float | None]:
    """A block's figures as results.json has them: null for a percentile of too few samples, and for an infinite one."""
    figures: dict[str, float | None] = {
        "peak_bytes": max((load["peak_bytes"] for load in loads.values()), default=0) or None,
        "throughput": loads[SATURATED]["throughput"] if SATURATED in loads else None,
    }
    for name in loads.keys() & {MODERATE, HIGH}:
        for rank in (50, 95, 99):
            value, count = loads[name][f"p{rank}_ms"], loads[name].get("requests", 0)
            infinite = value is None and count * (100 - rank) / 100 >= MIN_BEYOND
            figures[f"{name}_p{rank}"] = math.inf if infinite else value
    return figures


def _machines(before: _Run, after: _Run) -> str:
    """In what they differ."""
    pairs = [(name, before.environment.get(name), after.environment.get(name)) for name in ("cpu", "cores")]
    return "; ".join(f"{name}: {was} and {now}" for name, was, now in pairs if was != now)


def _is_relative(before: _Run, after: _Run) -> bool:
    return bool(_machines(before, after)) and before.baseline == after.baseline


def _comparable(before: _Run, after: _Run) -> list[str]:
    """Keys of the figures that were measured under the same load."""
    same = {
        name
        for name in before.rates.keys() & after.rates.keys()
        if abs(math.log(after.rates[name] / before.rates[name])) <= math.log1p(_SAME_RATE)
    }
    return [key for key in UNITS if UNITS[key] != "ms" or key.rpartition("_")[0] in same]


def _slower(before: _Run, after: _Run) -> float:
    """By what share of the old median throughput of the baseline."""
    was, now = (list(run.figures.get((run.baseline, "throughput"), {}).values()) for run in (before, after))
    return 1 - float(np.median(now)) / float(np.median(was)) if was and now and np.median(was) else 0.0


def _stopped(before: _Run, arm: str) -> Regression:
    was = float(np.median(list(before.figures[arm, "throughput"].values())))
    return Regression(arm=arm, key="throughput", old=was, new=0.0, ratio=0.0, low=0.0, high=0.0, level=1.0, p_value=0.0)
