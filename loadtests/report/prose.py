"""The facts behind the sentences of a comparison's report; the sentences stand in the text templates (`*.txt.j2`)."""

import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from loadtests.experiment.model import HIGH, MODERATE, Arm, Comparison
from loadtests.experiment.schedule import without_repeats
from loadtests.report.format import difference, estimate_text, interval_text, number, value_text
from loadtests.report.rendering import joined, sentences
from loadtests.report.verdicts import (
    THROUGHPUT,
    TOP1,
    Change,
    Findings,
    Metric,
    compare_top1,
    counts,
    load_name,
    loads_of,
    model_info,
    uses_device,
)
from loadtests.statistics import MIN_ROUNDS

_BUSY_CORES = 0.9
"""CPU of the generator's process, which can use one core and no more."""
_LATE_SHARE = 0.002
"""Part of the arrivals: a fifth of what lies beyond the 99th percentile."""
_KEEPING_UP = 0.95
"""Answered by offered rate: with less, the queue grows for as long as the load lasts."""
_FULL = 0.95
"""Part of the machine's cores."""


def caveats(comparison: Comparison, findings: Findings) -> list[str]:
    """What a reader must know before believing the verdicts, one sentence each, most important first."""
    plan = comparison.plan
    arms = [
        {"label": arm.label, "reasons": _reasons(comparison, arm), **counts(comparison, arm.label)} for arm in plan.arms
    ]
    measured = {(block.arm, block.round) for block in comparison.blocks}
    rounds = {number for _, number in measured}
    busy, late, behind, used = {}, {}, {}, {"": 0.0}
    for label, name, loads in loads_of(comparison):
        what = f"{label} at {load_name(comparison, name)}"
        busy[what] = float(np.median([load.generator_cores for load in loads]))
        used[what] = float(np.median([load.generator_cores + load.server_cores for load in loads]))
        late[what] = sum(load.late_arrivals for load in loads) / max(1, sum(load.arrivals for load in loads))
        # Chance makes the arrivals of a short window fewer than the rate says.
        due = [min(load.offered_rate or 0, len(load.latencies_ms) / plan.seconds) for load in loads]
        if np.median([load.throughput - _KEEPING_UP * rate for load, rate in zip(loads, due, strict=True)]) < 0:
            behind[what] = float(np.median([load.throughput for load in loads]))
    cores, fullest = float(comparison.environment.get("cores", "inf")), max(used, key=lambda what: used[what])
    return sentences(
        "caveats.txt.j2",
        arms=arms,
        noise_floors=_noise_floors(comparison, findings),
        rounds=sum(all((arm.label, number) in measured for arm in plan.arms) for number in rounds),
        default_rounds=plan.default_rounds,
        min_rounds=MIN_ROUNDS,
        busy={what: cores for what, cores in busy.items() if cores > _BUSY_CORES},
        late={what: share for what, share in late.items() if share > _LATE_SHARE},
        ended_early=(comparison.ended_early or "").rstrip("."),
        mixed_memory=len(uses_device(comparison)) > 1,
        behind=behind,
        fullest=fullest if used[fullest] >= _FULL * cores else "",
        used=used[fullest],
        cores=cores,
    )


def _reasons(comparison: Comparison, arm: Arm) -> list[str]:
    failures = [block.failure for block in comparison.failures if block.arm == arm.label]
    return list(dict.fromkeys((failure or "").rstrip(".") for failure in failures))


def conclusion(comparison: Comparison, findings: Findings) -> list[str]:
    """A summary, then one sentence for each arm; nothing that the verdicts do not say."""
    baseline, *compared = (arm.label for arm in without_repeats(comparison.plan))
    failed = {block.arm for block in comparison.failures}
    kinds: dict[str, list[str]] = defaultdict(list)
    for label in compared:
        verdicts = {row.verdict for row in findings.rows if row.arm == label and row.verdict}
        differs = " and ".join(sorted(verdicts - {"no difference seen"}))
        if label in failed or verdicts:
            kinds["failed" if label in failed else differs or "alike"].append(label)
    return sentences(
        "conclusion.txt.j2",
        baseline=baseline,
        kinds=kinds,
        arms={label: _phrases(comparison, findings, label) for label in compared},
        noise_floors=_noise_floors(comparison, findings),
    )


def _phrases(comparison: Comparison, findings: Findings, label: str) -> list[str]:
    """Gains, then losses, then what shows no difference or has no interval."""
    rows = [row for metric in findings.headline if (row := findings.row(label, metric)) and row.value is not None]
    gains, losses = (
        [_phrase(row.metric, row.change) for row in rows if row.change and row.verdict == verdict]
        for verdict in ("better", "worse")
    )
    alike = [row.metric.label for row in rows if row.verdict == "no difference seen"]
    untested = [
        f"{row.metric.label} {value_text(row.metric, row.value)} against {value_text(row.metric, base)}"
        for row in rows
        if row.change is None and (base := findings.value(comparison.plan.arms[0].label, row.metric)) is not None
    ]
    parts = [*gains, *([f"but {losses[0]}", *losses[1:]] if gains and losses else losses)]
    parts += [f"no difference seen in {joined(alike)}"] if alike else []
    return parts + ([f"without an interval: {joined(untested)}"] if untested else [])


def _phrase(metric: Metric, change: Change) -> str:
    if metric.kind == "ratio":
        ratio = f"{estimate_text(metric, change)} ({interval_text(metric, change)})"
        return f"answers {ratio} as many images at saturation" if metric == THROUGHPUT else f"{metric.label} is {ratio}"
    least, most = map(number, sorted((abs(change.low), abs(change.high))))
    size, ends = (f"at least {difference(metric, least)}", "(requests were not answered)")
    if math.isfinite(change.estimate):
        size, ends = difference(metric, number(abs(change.estimate))), f"({least}–{most})"
    return f"{metric.label} is {size} {'lower' if change.estimate < 0 else 'higher'} {ends}"


class _NoiseFloor(NamedTuple):
    arm: str | None
    tested: int
    differs: list[str]
    """The metrics in which the arm differs from itself."""


def _noise_floors(comparison: Comparison, findings: Findings) -> list[_NoiseFloor]:
    found = []
    for arm in (arm for arm in comparison.plan.arms if arm.repeat_of):
        # Its top-1 is the same by nature.
        tested = [row for row in findings.rows if row.arm == arm.label and row.change and row.metric != TOP1]
        differs = [row.metric.label for row in tested if row.verdict != "no difference seen"]
        found.append(_NoiseFloor(arm.repeat_of, len(tested), differs))
    return found


def top1_note(comparison: Comparison) -> str:
    """On which images top-1 was taken, how it is compared, and what it does not say."""
    baseline, *others = comparison.plan.arms
    infos = {arm: model_info(comparison, arm.label) for arm in comparison.plan.arms}
    known = [info["accuracy"] for info in infos.values() if info.get("accuracy")]
    sets = {f"{one.get('dataset', '?')} {one.get('split', '')}, n = {one.get('n', 0):,}" for one in known}
    random = [arm.label for arm, info in infos.items() if info and not info.get("accuracy") and not arm.repeat_of]
    pairings = {compare_top1(infos[arm], infos[baseline])[1] for arm in others if not arm.repeat_of}
    return " ".join(sentences("top1_note.txt.j2", test_sets=sorted(sets), pairings=pairings, random=random))


def conditions(comparison: Comparison) -> str:
    """In one sentence, the conditions under which the report holds."""
    plan = comparison.plan
    opened = f", open loops at {rates}" if (rates := rates_text(comparison)) else ""
    loops = f"closed loop of {plan.connections} connections{opened}"
    early = f" Ended early: {comparison.ended_early}." if comparison.ended_early else ""
    return f"{plan.rounds} rounds, {loops}, {plan.seconds:g} s each; {comparison.payloads or 'no payloads'}.{early}"


def rates_text(comparison: Comparison) -> str:
    """The rates of the open loops; empty before they are known."""
    return joined([load_name(comparison, load) for load in (MODERATE, HIGH) if load in comparison.rates])
