"""The sentences and tables of a comparison: the facts for the text templates (`*.txt.j2`) that phrase them."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from loadtests.experiment.model import HIGH, LOADS, MODERATE, Comparison
from loadtests.experiment.schedule import without_repeats
from loadtests.generator.load_result import LoadResult
from loadtests.report import verdicts
from loadtests.report.findings import GPU_MEMORY, TOP1, Findings, Metric, Row, Verdict
from loadtests.report.rendering import UNKNOWN, Cell, Table, Tone, joined, median, sentences, tables
from loadtests.report.verdicts import counts, load_name, loads_of, model_info
from loadtests.statistics import MIN_ROUNDS

_VERDICTS: dict[Verdict, str] = {"better": "✓ better", "worse": "✗ worse", "no difference seen": "○ no diff."}
_TONES: dict[Verdict, Tone] = {"better": "better", "worse": "worse", "no difference seen": "faint"}
_KEEPING_UP = 0.95
"""Answered ÷ offered rate: below it, the queue grows for as long as the load lasts."""


def caveats(comparison: Comparison, findings: Findings) -> list[str]:
    """What a reader must know before believing the verdicts, one sentence each, most important first."""
    plan = comparison.plan
    measured = {(block.arm, block.round) for block in comparison.blocks}
    rounds = {number for _, number in measured}
    return sentences(
        "caveats.txt.j2",
        plan=plan,
        arms={arm.label: counts(comparison, arm.label) for arm in plan.arms},
        failures=comparison.failures,
        noise_floors=_noise_floors(comparison, findings),
        rounds=sum(all((arm.label, number) in measured for arm in plan.arms) for number in rounds),
        min_rounds=MIN_ROUNDS,
        loads=[
            {"name": f"{label} at {load_name(comparison, name)}", **_limits(loads, plan.seconds)}
            for (label, name), loads in loads_of(comparison).items()
        ],
        ended_early=(comparison.ended_early or "").rstrip("."),
        mixed_memory=len(verdicts.uses_device(comparison)) > 1,
        cores=float(comparison.environment.get("cores", "inf")),
    )


def _limits(loads: list[LoadResult], seconds: float) -> dict[str, Any]:
    """What, other than the server, may have limited an arm under a load: medians of the blocks; `late` over all."""
    # By chance, a short window may have fewer arrivals than its rate implies.
    due = [min(load.offered_rate or 0, len(load.latencies_ms) / seconds) for load in loads]
    ahead = [load.throughput - _KEEPING_UP * rate for load, rate in zip(loads, due, strict=True)]
    # A closed loop has no arrivals that could be late.
    arrivals = sum(load.arrivals for load in loads)
    return {
        "answered": np.median([load.throughput for load in loads]),
        "behind": np.median(ahead) < 0,
        "generator_cores": np.median([load.generator_cores for load in loads]),
        "used_cores": np.median([load.generator_cores + load.server_cores for load in loads]),
        "late": sum(load.late_arrivals for load in loads) / arrivals if arrivals else 0.0,
    }


def conclusion(comparison: Comparison, findings: Findings) -> list[str]:
    """A summary, then one sentence for each arm; nothing that the verdicts do not say."""
    baseline, *compared = (arm.label for arm in without_repeats(comparison.plan))
    failed = {block.arm for block in comparison.failures}
    kinds: dict[str, list[str]] = defaultdict(list)
    for label in compared:
        seen = {row.verdict for row in findings.rows if row.arm == label and row.verdict}
        differs = " and ".join(sorted(seen - {"no difference seen"}))
        if label in failed or seen:
            kinds["failed" if label in failed else differs or "alike"].append(label)
    rows = [row for row in findings.rows if row.arm in compared and row.value is not None and row.base is not None]
    judged = {row.metric for row in rows if row.verdict}
    unjudged = [metric.label for metric in findings.headline if metric in {row.metric for row in rows} - judged]
    return sentences(
        "conclusion.txt.j2",
        baseline=baseline,
        kinds=kinds,
        unjudged=unjudged if judged else [],
        arms={label: _phrases(findings, label) for label in compared},
        noise_floors=_noise_floors(comparison, findings),
    )


def _phrases(findings: Findings, label: str) -> list[str]:
    rows = [row for metric in findings.headline if (row := findings.row(label, metric)) and row.value is not None]
    untested = [
        f"{row.metric.label} {row.metric.text(row.value)} against {row.metric.text(row.base)}"
        for row in rows
        if row.change is None and row.base is not None
    ]
    return sentences("phrases.txt.j2", rows=rows, untested=untested)


def _noise_floors(comparison: Comparison, findings: Findings) -> dict[str, list[Row]]:
    """What was tested, by arm that was measured twice; its top-1 is necessarily the same."""
    return {
        arm.repeat_of: [row for row in findings.rows if row.arm == arm.label and row.change and row.metric != TOP1]
        for arm in comparison.plan.arms
        if arm.repeat_of
    }


def top1_note(comparison: Comparison) -> str:
    """On which images top-1 was measured, how it is compared, and what it does not say."""
    arms = without_repeats(comparison.plan)
    infos = {arm.label: model_info(comparison, arm.label) for arm in arms}
    known = [info["accuracy"] for info in infos.values() if info.get("accuracy")]
    sets = {f"{one.get('dataset', '?')} {one.get('split', '')}, n = {one.get('n', 0):,}" for one in known}
    random = [label for label, info in infos.items() if info and not info.get("accuracy")]
    pairings = {verdicts.compare_top1(infos[arm.label], infos[arms[0].label])[1] for arm in arms[1:]}
    return " ".join(sentences("top1_note.txt.j2", test_sets=sorted(sets), pairings=pairings, random=random))


def conditions(comparison: Comparison) -> str:
    """In one sentence, the conditions under which the report holds."""
    return sentences("conditions.txt.j2", comparison=comparison, rates=rates_text(comparison))[0]


def rates_text(comparison: Comparison) -> str:
    """The rates of the open loops; empty before they are known."""
    return joined([load_name(comparison, load) for load in (MODERATE, HIGH) if load in comparison.rates])


def verdict_table(comparison: Comparison, findings: Findings) -> Table:
    """One row for each arm, the baseline first: value, change, interval and verdict of every headline metric."""
    rows: list[list[str | Cell]] = []
    for arm in comparison.plan.arms:
        mark = "baseline" if arm is comparison.plan.arms[0] else "noise floor" if arm.repeat_of else ""
        tokens = verdicts.tokens_text(model_info(comparison, arm.label)) or UNKNOWN
        cells = [_verdict(comparison, findings, arm.label, metric) for metric in findings.headline]
        rows.append([Cell(f"{arm.label}\n{mark}".strip(), "faint"), tokens, *cells])
    return Table(
        title=f"{conditions(comparison)} {top1_note(comparison)}",
        headings=("arm", "K/V tokens", *(metric.heading for metric in findings.headline)),
        rows=rows,
        note="Below each value: its change against the baseline, the interval of that change, and what the interval "
        "says: ✓ better, ✗ worse, ○ no difference seen (which does not prove that there is none).",
    )


def _verdict(comparison: Comparison, findings: Findings, label: str, metric: Metric) -> Cell:
    row = findings.row(label, metric)
    if row is None or (metric == TOP1 and row.value is None):
        info = model_info(comparison, label)
        return Cell("random weights" if info and not info.get("accuracy") else UNKNOWN)
    value, (estimate, interval) = metric.text(row.value), row.change_texts
    if row.verdict is None:
        return Cell(value)
    lines = (value, estimate, f"({interval.replace(' to ', '…')})", _VERDICTS[row.verdict])
    return Cell("\n".join(lines), _TONES[row.verdict])


def detail_tables(comparison: Comparison, findings: Findings) -> list[Table]:
    """All other tables, as `compare_tables.txt.j2` lays them out."""
    blocks = {arm.label: comparison.blocks_of(arm.label) for arm in comparison.plan.arms}
    return tables(
        "compare_tables.txt.j2",
        comparison=comparison,
        plan=comparison.plan,
        infos={label: model_info(comparison, label) for label in blocks},
        blocks=blocks,
        loads={label: [load for block in own for load in block.loads.values()] for label, own in blocks.items()},
        measured=loads_of(comparison),
        load_names={name: load_name(comparison, name) for name in LOADS},
        gpu_mb={label: verdicts.values_by_round(own, GPU_MEMORY).values() for label, own in blocks.items()},
        stages=_stages(comparison),
        rows=findings.rows,
    )


def _stages(comparison: Comparison) -> Iterator[tuple[str, str, dict[str, float | None]]]:
    """Arm, load, and the time of each stage, of what lies outside them, and of the whole."""
    measured = loads_of(comparison)
    names = dict.fromkeys(name for loads in measured.values() for load in loads for name in load.stages_ms)
    names.pop("total", None)
    for (label, name), loads in measured.items():
        parts = {part: median(load.stages_ms.get(part) for load in loads) for part in names}
        total = median(load.stages_ms.get("total") for load in loads)
        rest = None if total is None else total - sum(value or 0.0 for value in parts.values())
        if total or any(parts.values()):
            yield label, name, {**parts, "rest": rest, "total": total}


def environment(comparison: Comparison) -> dict[str, str]:
    """The machine and its software, then the weights of each arm."""
    facts = dict(comparison.environment)
    for arm in without_repeats(comparison.plan):
        info = model_info(comparison, arm.label)
        source = info.get("source") or {}
        parts = {
            "checkpoint sha256": source.get("checkpoint_sha256"),
            "exported at commit": source.get("git_commit"),
            "model.onnx sha256": info.get("sha256"),
        }
        if known := [f"{name} {value}" for name, value in parts.items() if value]:
            facts[arm.label] = ", ".join(known)
    return facts
