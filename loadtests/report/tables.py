"""The tables of a comparison: the verdicts first, then one for each question that a reader may ask."""

from collections.abc import Iterator

from loadtests.experiment.model import LOADS, Comparison
from loadtests.experiment.schedule import without_repeats
from loadtests.report.findings import GPU_MEMORY, TOP1, Findings, Metric, Verdict
from loadtests.report.prose import conditions, top1_note
from loadtests.report.rendering import UNKNOWN, Cell, Table, Tone, median, tables
from loadtests.report.verdicts import load_name, loads_of, model_info, tokens_text, values_by_round

_VERDICTS: dict[Verdict, tuple[str, Tone]] = {
    "better": ("✓ better", "better"),
    "worse": ("✗ worse", "worse"),
    "no difference seen": ("○ no diff.", "faint"),
}


def verdict_table(comparison: Comparison, findings: Findings) -> Table:
    """One row for each arm, the baseline first: value, change, interval and verdict of every headline metric."""
    rows: list[list[str | Cell]] = []
    for arm in comparison.plan.arms:
        mark = "baseline" if arm is comparison.plan.arms[0] else "noise floor" if arm.repeat_of else ""
        tokens = tokens_text(model_info(comparison, arm.label)) or UNKNOWN
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
    value = metric.text(row.value)
    if row.change is None:
        return Cell(value)
    (estimate, interval), (verdict, tone) = row.change_texts, _VERDICTS[row.change.verdict]
    return Cell("\n".join((value, estimate, f"({interval.replace(' to ', '…')})", verdict)), tone)


def detail_tables(comparison: Comparison, findings: Findings) -> list[Table]:
    """All others, as `compare_tables.txt.j2` lays them out."""
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
        gpu_mb={label: values_by_round(own, GPU_MEMORY).values() for label, own in blocks.items()},
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
