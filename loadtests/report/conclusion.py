"""What the intervals of a comparison say, in sentences, and under which conditions."""

import math

from loadtests.experiment.model import HIGH, MODERATE, Arm, Comparison
from loadtests.report.format import (
    difference,
    estimate_text,
    interval_text,
    joined,
    load_name,
    metric_name,
    number,
    value_text,
)
from loadtests.report.rendering import UNKNOWN
from loadtests.report.top1 import compare_top1
from loadtests.report.verdicts import THROUGHPUT, TOP1, Change, Findings, Metric, model_info

_KINDS = {
    (True, False): "Better in some respect, worse in none",
    (True, True): "Better in some respects, worse in others",
    (False, True): "Worse in some respect, better in none",
    (False, False): "No difference seen",
}
"""What is said of an arm, by whether any of its metrics is (better, worse)."""


def conclusion(comparison: Comparison, findings: Findings) -> list[str]:
    """A summary, then one sentence for each arm; nothing that the verdicts do not say."""
    baseline, *others = comparison.plan.arms
    compared = [arm for arm in others if arm.repeat_of is None]
    if not compared:
        return ["Only one arm was measured: there is nothing to compare it with."]
    sentences = [f"The baseline is {baseline.label}. {_summary(comparison, findings, compared)}"]
    sentences += [_sentence(comparison, findings, arm.label) for arm in compared]
    return sentences + [sentence for _, sentence in noise_floor(comparison, findings)]


def _summary(comparison: Comparison, findings: Findings, arms: list[Arm]) -> str:
    failed = {block.arm for block in comparison.blocks if block.failure is not None}
    kinds: dict[str, list[str]] = {words: [] for words in _KINDS.values()}
    for arm in arms:
        verdicts = {row.change.verdict for row in findings.rows if row.arm == arm.label and row.change}
        if verdicts and arm.label not in failed:
            kinds[_KINDS["better" in verdicts, "worse" in verdicts]].append(arm.label)
    kinds["Failed in some blocks, so judge for yourself"] = [arm.label for arm in arms if arm.label in failed]
    said = [f"{words}: {joined(labels)}." for words, labels in kinds.items() if labels]
    return " ".join(said) or "There are too few blocks to say whether any arm differs from it."


def _sentence(comparison: Comparison, findings: Findings, label: str) -> str:
    gains: list[str] = []
    losses: list[str] = []
    alike: list[str] = []
    untested: list[str] = []
    for metric in findings.headline:
        row, base = findings.row(label, metric), findings.value(comparison.plan.arms[0].label, metric)
        name = metric_name(comparison, metric)
        if row is None or row.value is None:
            continue
        if row.change is None:
            if base is not None:
                untested.append(f"{name} {value_text(metric, row.value)} against {value_text(metric, base)}")
        elif row.change.verdict == "no difference seen":
            alike.append(name)
        else:
            (gains if row.change.verdict == "better" else losses).append(_phrase(name, metric, row.change))
    parts = [*gains, *([f"but {losses[0]}", *losses[1:]] if gains and losses else losses)]
    if alike:
        parts.append(f"no difference seen in {joined(alike)}")
    if untested:
        parts.append(f"without an interval: {joined(untested)}")
    return f"{label}: {'; '.join(parts) or 'nothing could be compared'}."


def _phrase(name: str, metric: Metric, change: Change) -> str:
    if metric.kind == "ratio":
        ratio = f"{estimate_text(metric, change)} ({interval_text(metric, change)})"
        return f"answers {ratio} as many images at saturation" if metric == THROUGHPUT else f"{name} is {ratio}"
    side = "lower" if change.estimate < 0 else "higher"
    least, most = sorted((abs(change.low), abs(change.high)))
    if math.isinf(change.estimate):
        return f"{name} is at least {difference(metric, number(least))} {side} (requests were not answered)"
    return f"{name} is {difference(metric, number(abs(change.estimate)))} {side} ({number(least)}–{number(most)})"


def noise_floor(comparison: Comparison, findings: Findings) -> list[tuple[bool, str]]:
    """Whether an A/A arm differs from the arm that it repeats, and a sentence about it."""
    said = []
    for arm in comparison.plan.arms:
        # Its top-1 is the same by nature.
        tested = [row for row in findings.rows if row.arm == arm.label and row.change and row.metric != TOP1]
        seen = [row.metric for row in tested if row.change and row.change.verdict != "no difference seen"]
        names = joined([metric_name(comparison, metric) for metric in seen])
        found = f"shows no difference in any of {len(tested)} metrics, as it should."
        if seen:
            found = f"differs from itself in {names}. The machine makes such differences, not the models: "
            found += "do not believe others of that size here."
        elif not tested:
            found = "has too few blocks for intervals."
        if arm.repeat_of is not None:
            start = f"Noise floor: {arm.repeat_of}, measured a second time as if it were another arm,"
            said.append((bool(seen), f"{start} {found}"))
    return said


def top1_note(comparison: Comparison) -> str:
    """On which images top-1 was taken, how it is compared, and what it does not say."""
    baseline, *others = comparison.plan.arms
    infos = {arm.label: model_info(comparison, arm.label) for arm in comparison.plan.arms}
    accuracies = [info["accuracy"] for info in infos.values() if info.get("accuracy")]
    parts = []
    if accuracies:
        sets = {f"{one.get('dataset', '?')} {one.get('split', '')}, n = {one.get('n', 0):,}" for one in accuracies}
        pairings = {compare_top1(infos[arm.label], infos[baseline.label])[1] for arm in others if arm.repeat_of is None}
        parts.append(f"Top-1 is the manifest's ({'; '.join(sorted(sets))}).")
        if "paired" in pairings:
            parts.append("It is compared image by image (exact McNemar test).")
        if "independent" in pairings:
            parts.append(
                ("Where a manifest does not say which images it gets right, it" if "paired" in pairings else "It")
                + " is compared as if each arm had been asked other images, which is cautious."
            )
        parts.append("It belongs to these weights: training with another seed may change it by as much.")
    random = [
        arm.label
        for arm in comparison.plan.arms
        if infos[arm.label] and not infos[arm.label].get("accuracy") and arm.repeat_of is None
    ]
    if random:
        parts.append(f"Random weights, so speed and memory only: {joined(random)}.")
    return " ".join(parts)


def arm_text(arm: Arm) -> str:
    """What distinguishes an arm, beside its label."""
    parts = [arm.model if arm.model != arm.label else ""]
    parts += [f"{name}={value}" for name, value in arm.settings]
    parts += [f"server at {arm.url}" if arm.url else "", f"service of commit {arm.commit}" if arm.commit else ""]
    parts.append(f"the same as {arm.repeat_of}, to show the noise" if arm.repeat_of else "")
    return ", ".join(filter(None, parts)) or UNKNOWN


def conditions(comparison: Comparison) -> str:
    """In one sentence, the conditions under which the report holds."""
    plan = comparison.plan
    rates = joined([load_name(comparison, load) for load in (MODERATE, HIGH) if load in comparison.rates])
    loops = f"closed loop of {plan.connections} connections" + (f", open loops at {rates}" if rates else "")
    early = f" Ended early: {comparison.ended_early}." if comparison.ended_early else ""
    return f"{plan.rounds} rounds, {loops}, {plan.seconds:g} s each; {comparison.payloads or 'no payloads'}.{early}"
