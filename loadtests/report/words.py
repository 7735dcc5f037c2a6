"""A comparison in words: the conclusion that the intervals carry, how it was measured, and how it is to be read."""

import math

from loadtests.experiment.model import HIGH, MODERATE, Arm, Comparison
from loadtests.generator.load_result import IN_FLIGHT
from loadtests.report.figures import (
    UNKNOWN,
    headline,
    info_of,
    interval_text,
    listed,
    load_name,
    metric_name,
    number,
    ordered,
    ratio_text,
    scaled,
    unit,
    value_text,
)
from loadtests.report.verdicts import Change, Findings, Metric, Row

_KINDS = {
    (True, False): "Better in something, and not seen worse in anything",
    (True, True): "Better in something and worse in something else",
    (False, True): "Worse in something, and not seen better in anything",
    (False, False): "No difference seen in anything",
}
"""Of arms, by whether any of their figures is (better, worse)."""


def conclusion(comparison: Comparison, findings: Findings) -> list[str]:
    """What the intervals carry, a sentence an arm: nothing that the verdicts do not say."""
    rows = ordered(findings)
    others = [row for row in rows[1:] if row.arm.repeat_of is None]
    if not others:
        return ["Only one arm was measured: there is nothing to compare it with."]
    baseline = rows[0]
    sentences = [f"The baseline is {baseline.arm.label}. {_summary(findings, others)}"]
    sentences += [_sentence(comparison, findings, baseline, row) for row in others]
    sentences += [_noise(comparison, findings, row) for row in rows if row.arm.repeat_of is not None]
    return sentences


def _summary(findings: Findings, rows: list[Row]) -> str:
    kinds: dict[str, list[str]] = {words: [] for words in _KINDS.values()}
    for row in rows:
        if row.failed:
            continue
        verdicts = {change.verdict for metric in findings.metrics if (change := _change(row, metric))}
        if verdicts:
            kinds[_KINDS["better" in verdicts, "worse" in verdicts]].append(row.arm.label)
    kinds["Failed in some blocks, so judge for yourself"] = [row.arm.label for row in rows if row.failed]
    said = [f"{words}: {listed(labels)}." for words, labels in kinds.items() if labels]
    return " ".join(said) or "There are too few blocks to say whether any arm differs from it."


def _sentence(comparison: Comparison, findings: Findings, baseline: Row, row: Row) -> str:
    gains: list[str] = []
    losses: list[str] = []
    alike: list[str] = []
    untested: list[str] = []
    for metric in headline(findings):
        figure, base = row.figures.get(metric.key), baseline.figures.get(metric.key)
        if figure is None or base is None:
            continue
        if figure.change is not None:
            name = metric_name(comparison, metric)
            if figure.change.verdict == "no difference seen":
                alike.append(name)
            else:
                (gains if figure.change.verdict == "better" else losses).append(_phrase(name, metric, figure.change))
        elif figure.value is not None and base.value is not None:
            values = f"{value_text(metric, figure.value)} against {value_text(metric, base.value)}"
            untested.append(f"{metric_name(comparison, metric)} {values}")
    parts = [*gains]
    parts += [f"but {losses[0]}", *losses[1:]] if gains and losses else losses
    if alike:
        parts.append(f"no difference seen in {listed(alike)}")
    if untested:
        parts.append(f"without an interval: {listed(untested)}")
    return f"{row.arm.label}: {'; '.join(parts) or 'nothing could be compared'}."


def _phrase(name: str, metric: Metric, change: Change) -> str:
    if metric.kind == "ratio":
        of_it = f"×{ratio_text(change.estimate, change)} ({interval_text(metric, change)})"
        return f"answers {of_it} as many images at saturation" if metric.key == "throughput" else f"{name} is {of_it}"
    side = "lower" if change.estimate < 0 else "higher"
    least, most = sorted((abs(scaled(metric, change.low)), abs(scaled(metric, change.high))))
    if math.isinf(change.estimate):
        return f"{name} is at least {number(least)} {unit(metric)} {side} (so many were not answered)"
    size = number(abs(scaled(metric, change.estimate)))
    return f"{name} is {size} {unit(metric)} {side} ({number(least)}–{number(most)})"


def _noise(comparison: Comparison, findings: Findings, row: Row) -> str:
    # The accuracy of its manifest is the same by nature.
    judged = [metric for metric in findings.metrics if metric.key != "top1" and _change(row, metric) is not None]
    seen = [metric for metric in judged if (change := _change(row, metric)) and change.verdict != "no difference seen"]
    start = f"Noise floor: {row.arm.repeat_of} measured a second time as if it were another arm"
    if not judged:
        return f"{start} has too few blocks for intervals."
    if seen:
        names = listed([metric_name(comparison, metric) for metric in seen])
        return f"{start} differs from itself in {names}: do not trust differences of that size in this report."
    return f"{start} shows no difference in any of {len(judged)} figures, as it should."


def _change(row: Row, metric: Metric) -> Change | None:
    figure = row.figures.get(metric.key)
    return figure.change if figure else None


def accuracy_note(comparison: Comparison) -> str:
    """Of which images the accuracies are."""
    sets, random = set(), []
    for arm in comparison.plan.arms:
        info = info_of(comparison, arm.label)
        accuracy = info.get("accuracy")
        if accuracy:
            sets.add(f"{accuracy.get('dataset', '?')} {accuracy.get('split', '')}, n = {accuracy.get('n', 0):,}")
        elif info and arm.repeat_of is None:
            random.append(arm.label)
    parts = []
    if sets:
        parts.append(
            f"Top-1 of {'; '.join(sorted(sets))}, by the manifests, and compared as if each arm had been asked "
            "other images, which is cautious."
        )
    if random:
        parts.append(f"Random weights, so speed and memory only: {listed(random)}.")
    return " ".join(parts)


def arm_text(arm: Arm) -> str:
    """What makes an arm, beside its label."""
    parts = [arm.model if arm.model != arm.label else ""]
    parts += [f"{name}={value}" for name, value in arm.settings]
    parts += [f"server at {arm.url}" if arm.url else "", f"service of commit {arm.commit}" if arm.commit else ""]
    parts.append(f"the same as {arm.repeat_of}, to show the noise" if arm.repeat_of else "")
    return ", ".join(filter(None, parts)) or UNKNOWN


def conditions(comparison: Comparison) -> str:
    """In one sentence, what the figures hold for."""
    plan = comparison.plan
    rates = " and ".join(load_name(comparison, load) for load in (MODERATE, HIGH) if load in comparison.rates)
    loops = f"closed loop of {plan.connections} connections" + (f", open loops at {rates}" if rates else "")
    early = f" Ended early: {comparison.ended_early}." if comparison.ended_early else ""
    return f"{plan.rounds} rounds, {loops}, {plan.seconds:g} s each; {comparison.payloads or 'no payloads'}.{early}"


def how_measured(comparison: Comparison) -> list[str]:
    """The plan in words."""
    plan = comparison.plan
    done = {arm.label: len(comparison.blocks_of(arm.label)) for arm in plan.arms}
    few = f" The default is {plan.default_rounds}." if plan.rounds < plan.default_rounds else ""
    data = f"from {plan.data}" if plan.data else "generated"
    fractions = " and ".join(f"{share:.0%}" for share in plan.load_fractions)
    rates = " and ".join(load_name(comparison, load) for load in (MODERATE, HIGH) if load in comparison.rates)
    rounds = "/".join(map(str, sorted(set(done.values()))))
    said = [
        f"{plan.rounds} rounds planned, {rounds} measured to their end of each arm.{few} A round holds one block of "
        "every arm, and a block is a fresh server process that serves nothing else. Arms run in a random order, then "
        f"backwards (A B B A), then in another random order (seed {plan.seed}), so that drift hits all of them alike.",
        f"A block goes through three loads of {plan.seconds:g} measured seconds, each after a warm-up of "
        f"{plan.warmup_seconds:g} s that is dropped: two open loops of Poisson arrivals at {rates or 'set rates'} "
        f"({fractions} of what the slowest arm answered at saturation, or an earlier report's; the same arrivals for "
        f"every arm), then a closed loop of {plan.connections} connections, each of which sends when the last answer "
        "is there (saturation: throughput), whose warm-up is up to a second longer, at random for each round.",
        "In an open loop a request is sent when it is due, whether or not earlier ones are answered, and its latency "
        "counts from that moment: a queue in front of a slow server is seen. Requests not sent, because "
        f"{IN_FLIGHT} were under way, and those not answered with 200 stay among the latencies as infinite.",
        f"Every arm is sent the same images in the same order (/{plan.protocol}): {data}. {comparison.payloads}.",
    ]
    if plan.capacity_searches:
        said.append(
            f"In {plan.capacity_searches} rounds a bisection looked for the largest rate of arrivals that keeps "
            f"p{plan.objective_percentile:g} at or under {plan.objective_ms:g} ms."
        )
    if plan.service_arguments:
        said.append(f"Every service was started with: {' '.join(plan.service_arguments)}")
    return said


def how_to_read(findings: Findings) -> list[str]:
    """What the statistics say and do not say."""
    changes = [change for row in findings.rows for metric in findings.metrics if (change := _change(row, metric))]
    levels = sorted({f"{change.level:.4g}" for change in changes})
    level = f" (confidence {' to '.join(dict.fromkeys((levels[0], levels[-1])))})" if levels else ""
    return [
        "Throughput is the median of the blocks, a percentile is of the requests of all blocks, peak memory is the "
        "largest of all; a change is the mean over rounds of the arm against the baseline in the same round, which "
        "cancels what slowed a whole round down, so it can differ a little from that of the figures.",
        f"The intervals{level} are Student's t of these paired rounds, and “better” and “worse” are said only where a "
        "whole interval lies on one side of no difference: by Holm's procedure at most one report in twenty on equal "
        "arms says either of anything.",
        "“No difference seen” does not mean that there is none: the interval says how large it may still be.",
        "A percentile with fewer than five samples beyond it is not shown (–), and ∞ says that so many requests were "
        "not answered that the percentile falls among them.",
    ]
