"""The tables of a comparison: the verdicts first, then one for each question that a reader may ask."""

from collections.abc import Iterable

from loadtests.experiment.model import LOADS, Comparison
from loadtests.report.conclusion import arm_text, conditions, top1_note
from loadtests.report.format import (
    estimate_text,
    heading,
    interval_text,
    load_name,
    median,
    number,
    range_text,
    span,
    value_text,
)
from loadtests.report.rendering import UNKNOWN, Cell, Table, Tone
from loadtests.report.verdicts import TOP1, Findings, Metric, Verdict, loads_of, model_info

_VERDICTS: dict[Verdict, str] = {"better": "✓ better", "worse": "✗ worse", "no difference seen": "○ no diff."}
_TONES: dict[Verdict, Tone] = {"better": "better", "worse": "worse", "no difference seen": "faint"}


def verdict_table(comparison: Comparison, findings: Findings) -> Table:
    """One row for each arm, the baseline first: value, change, interval and verdict of every headline metric."""
    rows: list[list[str | Cell]] = []
    for arm in comparison.plan.arms:
        info = model_info(comparison, arm.label)
        mark = "baseline" if arm is comparison.plan.arms[0] else "noise floor" if arm.repeat_of else ""
        tokens = f"{info['kv_tokens']} of {info['tokens']}" if info.get("kv_tokens") and info.get("tokens") else UNKNOWN
        cells = [_verdict(comparison, findings, arm.label, metric) for metric in findings.headline]
        rows.append([Cell(f"{arm.label}\n{mark}".strip(), "faint"), tokens, *cells])
    return Table(
        title=f"{conditions(comparison)} {top1_note(comparison)}",
        headings=("arm", "K/V tokens", *(heading(comparison, metric) for metric in findings.headline)),
        rows=rows,
        note="Below each value: its change against the baseline, the interval of that change, and what the interval "
        "says: ✓ better, ✗ worse, ○ no difference seen (which does not prove that there is none).",
    )


def _verdict(comparison: Comparison, findings: Findings, label: str, metric: Metric) -> Cell:
    row = findings.row(label, metric)
    if row is None or (metric == TOP1 and row.value is None):
        info = model_info(comparison, label)
        return Cell("random weights" if info and not info.get("accuracy") else UNKNOWN)
    value, change = value_text(metric, row.value), row.change
    if change is None:
        return Cell(value)
    interval = interval_text(metric, change).replace(" to ", "…")
    lines = (value, estimate_text(metric, change), f"({interval})", _VERDICTS[change.verdict])
    return Cell("\n".join(lines), _TONES[change.verdict])


def detail_tables(comparison: Comparison, findings: Findings) -> list[Table]:
    """All others, by title; those without a row are left out."""
    tables = [
        _capacity(comparison),
        _memory(comparison),
        _stages(comparison),
        _loads(comparison),
        _failures(comparison),
        _every_metric(comparison, findings),
        _arms(comparison),
    ]
    return [table for table in tables if table.rows]


def _capacity(comparison: Comparison) -> Table:
    rows = []
    for arm in comparison.plan.arms:
        found = [search for search in comparison.capacity_searches if search.arm == arm.label]
        rates = [search.rate for search in found if search.rate is not None]
        reasons = dict.fromkeys(search.reason for search in found if search.reason)
        remark = "; ".join(reasons) or ("not even the lowest rate that was tried kept it" if 0 in rates else "")
        counts = f"{len(rates)} of {len(found)}"
        if found:
            rows.append((arm.label, number(median(rates)), span(rates), counts, remark))
    plan = comparison.plan
    return Table(
        title="Largest rate that keeps the objective",
        headings=("arm", "images/s, median", "smallest–largest", "searches", "remark"),
        rows=rows,
        text=(0, -1),
        note=f"The objective: p{plan.objective_percentile:g} at or under {plan.objective_ms:g} ms, open loop.",
    )


def _memory(comparison: Comparison) -> Table:
    rows = []
    for arm in comparison.plan.arms:
        blocks = comparison.blocks_of(arm.label)
        peaks = [[block.loads[name].peak_bytes for block in blocks if name in block.loads] for name in LOADS]
        devices = [max((load.device_bytes or 0 for load in block.loads.values()), default=0) for block in blocks]
        idle, after = [block.idle_bytes for block in blocks], [block.after_bytes for block in blocks]
        rows.append((arm.label, *map(_megabytes, (idle, *peaks, after, devices))))
    headings = ["arm", "idle", *(f"peak at {load_name(comparison, name)}" for name in LOADS), "after all loads"]
    if any(row[-1] != UNKNOWN for row in rows):
        headings.append("peak on the GPU")
    return Table(
        title="Memory",
        headings=headings,
        rows=[row[: len(headings)] for row in rows],
        note="MB, median of the blocks: of the service's whole process tree, each shared page counted once (PSS).",
    )


def _megabytes(values: Iterable[int]) -> str:
    middle = median(value for value in values if value)
    return UNKNOWN if middle is None else number(middle / 1e6)


def _stages(comparison: Comparison) -> Table:
    measured = loads_of(comparison)
    names = dict.fromkeys(name for _, _, loads in measured for load in loads for name in load.stages_ms)
    parts = [name for name in names if name != "total"]
    rows = []
    for label, name, loads in measured:
        times = {stage: median(load.stages_ms.get(stage) for load in loads) for stage in names}
        total = times.get("total")
        rest = None if total is None else total - sum(times[part] or 0.0 for part in parts)
        if any(times.values()):
            cells = [number(value) for value in (*(times[part] for part in parts), rest, total)]
            rows.append((label, load_name(comparison, name), *cells))
    return Table(
        title="Where the time went",
        headings=("arm", "load", *parts, "rest", "total"),
        rows=rows,
        text=(0, 1),
        note="Mean ms per image by the server's own clocks, median of the blocks. “Rest” is the part of the total "
        "outside the stages: reading the request, answering, and waiting for the event loop. What a client sees beyond "
        "the total is the network and the queue in front of the server.",
    )


def _loads(comparison: Comparison) -> Table:
    rows = []
    for label, name, loads in loads_of(comparison):
        answered = [load.throughput for load in loads]
        unsent, late = sum(load.unsent_arrivals for load in loads), sum(load.late_arrivals for load in loads)
        rows.append(
            (
                label,
                load_name(comparison, name),
                number(median(load.offered_rate for load in loads)),
                f"{number(median(answered))} ({span(answered)})",
                f"{sum(len(load.latencies_ms) for load in loads):,}",
                f"{sum(load.errors for load in loads):,}",
                *((f"{unsent:,}", f"{late:,}") if loads[0].mode == "open" else (UNKNOWN, UNKNOWN)),
                _cores(load.server_cores for load in loads),
                _cores(load.generator_cores for load in loads),
            )
        )
    counts = ("requests", "errors", "unsent", "late")
    return Table(
        title="Load, failures and CPU",
        headings=("arm", "load", "offered/s", "answered/s (blocks)", *counts, "server cores", "generator cores"),
        rows=rows,
        text=(0, 1),
        note="Counts over all blocks, without the warm-up; late requests were sent 5 ms or more after their moment. "
        "Cores are CPU time by wall time, median of the blocks: a generator near a whole core may be the limit, not "
        "the server.",
    )


def _cores(values: Iterable[float]) -> str:
    middle = median(values)
    return f"{middle:.2f}" if middle else UNKNOWN


def _failures(comparison: Comparison) -> Table:
    failed = [block for block in comparison.blocks if block.failure is not None]
    rows = [(block.arm, str(block.round + 1), block.failure or "") for block in failed]
    return Table(title="Failed blocks", headings=("arm", "round", "reason"), rows=rows, text=(0, 1, 2))


def _every_metric(comparison: Comparison, findings: Findings) -> Table:
    rows = []
    for row in findings.rows:
        change = row.change
        compared = (
            (
                estimate_text(row.metric, change),
                interval_text(row.metric, change),
                f"{change.level:.2%}",
                f"{change.p_value:.3f}" if change.p_value >= 0.0005 else "<0.001",
                change.verdict,
            )
            if change
            else (UNKNOWN,) * 5
        )
        name = heading(comparison, row.metric)
        rows.append((name, row.arm, value_text(row.metric, row.value), range_text(row), *compared))
    tested = ("change", "interval", "confidence", "adjusted p", "verdict")
    return Table(
        title="Every metric", headings=("metric", "arm", "value", "blocks", *tested), rows=rows, text=(0, 1, -1)
    )


def _arms(comparison: Comparison) -> Table:
    rows = []
    for arm in comparison.plan.arms:
        info, blocks = model_info(comparison, arm.label), comparison.blocks_of(arm.label)
        loads = [load for block in blocks for load in block.loads.values()]
        labelled, correct = sum(load.labelled for load in loads), sum(load.correct for load in loads)
        rows.append(
            (
                arm.label,
                arm_text(arm),
                str(info.get("precision") or UNKNOWN),
                *(number(info[name] / 1e6 if info.get(name) else None) for name in ("params", "macs")),
                f"{info['img_size']}×{info['img_size']}" if info.get("img_size") else UNKNOWN,
                f"{info['accuracy']['top1']:.2%}" if info.get("accuracy") else UNKNOWN,
                f"{correct / labelled:.2%} of {labelled:,}" if labelled else UNKNOWN,
                str(len(blocks)),
            )
        )
    model = ("precision", "parameters, M", "MACs, M", "image, px")
    return Table(
        title="What was compared",
        headings=("arm", "what differs", *model, "top-1 (manifest)", "right answers in this run", "blocks"),
        rows=rows,
        text=(0, 1),
    )


def environment(comparison: Comparison) -> dict[str, str]:
    """The machine and its software, then the weights of each arm."""
    facts = dict(comparison.environment)
    for arm in comparison.plan.arms:
        info = model_info(comparison, arm.label)
        source = info.get("source") or {}
        parts = {
            "checkpoint sha256": source.get("checkpoint_sha256"),
            "exported at commit": source.get("git_commit"),
            "model.onnx sha256": info.get("sha256"),
        }
        known = [f"{name} {value}" for name, value in parts.items() if value]
        if known and arm.repeat_of is None:
            facts[arm.label] = ", ".join(known)
    return facts
