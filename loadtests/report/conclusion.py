"""What the intervals of a comparison say, in sentences, and under which conditions."""

import math

from loadtests.experiment.model import HIGH, MODERATE, Arm, Comparison
from loadtests.report.format import difference, estimate_text, interval_text, joined, number, value_text
from loadtests.report.rendering import UNKNOWN
from loadtests.report.top1 import compare_top1
from loadtests.report.verdicts import THROUGHPUT, TOP1, Change, Findings, Metric, load_name, model_info

_KINDS = {
    (True, False): "Better in some respect, worse in none",
    (True, True): "Better in some respects, worse in others",
    (False, True): "Worse in some respect, better in none",
    (False, False): "No difference seen",
}
"""What is said of an arm, by whether any of its metrics is (better, worse)."""
_FAILED = "Failed in some blocks, so judge for yourself"


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
    kinds: dict[str, list[str]] = {words: [] for words in (*_KINDS.values(), _FAILED)}
    for arm in arms:
        verdicts = {row.verdict for row in findings.rows if row.arm == arm.label} - {None}
        if arm.label in failed:
            kinds[_FAILED].append(arm.label)
        elif verdicts:
            kinds[_KINDS["better" in verdicts, "worse" in verdicts]].append(arm.label)
    said = [f"{words}: {joined(labels)}." for words, labels in kinds.items() if labels]
    return " ".join(said) or "There are too few blocks to say whether any arm differs from it."


def _sentence(comparison: Comparison, findings: Findings, label: str) -> str:
    known = {metric: findings.row(label, metric) for metric in findings.headline}
    rows = [row for row in known.values() if row and row.value is not None]
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
    parts += [f"without an interval: {joined(untested)}"] if untested else []
    return f"{label}: {'; '.join(parts) or 'nothing could be compared'}."


def _phrase(metric: Metric, change: Change) -> str:
    if metric.kind == "ratio":
        ratio = f"{estimate_text(metric, change)} ({interval_text(metric, change)})"
        return f"answers {ratio} as many images at saturation" if metric == THROUGHPUT else f"{metric.label} is {ratio}"
    least, most = map(number, sorted((abs(change.low), abs(change.high))))
    size, ends = (f"at least {difference(metric, least)}", "(requests were not answered)")
    if math.isfinite(change.estimate):
        size, ends = difference(metric, number(abs(change.estimate))), f"({least}–{most})"
    return f"{metric.label} is {size} {'lower' if change.estimate < 0 else 'higher'} {ends}"


def noise_floor(comparison: Comparison, findings: Findings) -> list[tuple[bool, str]]:
    """Whether an A/A arm differs from the arm that it repeats, and a sentence about it."""
    said = []
    for arm in comparison.plan.arms:
        # Its top-1 is the same by nature.
        tested = [row for row in findings.rows if row.arm == arm.label and row.change and row.metric != TOP1]
        seen = [row.metric.label for row in tested if row.verdict != "no difference seen"]
        found = f"shows no difference in any of {len(tested)} metrics, as it should."
        if seen:
            found = f"differs from itself in {joined(seen)}. The machine makes such differences, not the models: "
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
