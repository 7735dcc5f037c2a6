"""The tables of a comparison: the verdicts first, then one for each question that a reader may ask."""

from collections.abc import Iterable, Iterator

from loadtests.experiment.model import LOADS, Arm, Comparison
from loadtests.experiment.schedule import without_repeats
from loadtests.report.format import change_texts, median, number, range_text, span, tokens_text, value_text
from loadtests.report.prose import conditions, top1_note
from loadtests.report.rendering import UNKNOWN, Cell, Table, Tone
from loadtests.report.verdicts import TOP1, Findings, Metric, Verdict, load_name, loads_of, model_info, uses_device

_VERDICTS: dict[Verdict, tuple[str, Tone]] = {
    "better": ("✓ better", "better"),
    "worse": ("✗ worse", "worse"),
    "no difference seen": ("○ no diff.", "faint"),
}
_TEXT = {"arm", "load", "remark", "round", "reason", "metric", "verdict", "what differs"}
"""Headings of columns of text."""

_Rows = Iterator[dict[str, str]]
"""Cells by heading."""


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
    value = value_text(metric, row.value)
    if row.change is None:
        return Cell(value)
    (estimate, interval), (verdict, tone) = change_texts(metric, row.change), _VERDICTS[row.change.verdict]
    return Cell("\n".join((value, estimate, f"({interval.replace(' to ', '…')})", verdict)), tone)


def detail_tables(comparison: Comparison, findings: Findings) -> list[Table]:
    """All others, by title; those without a row are left out. Their notes stand in `compare_prose.j2`."""
    by_title = {
        "Largest rate that keeps the objective": _capacity(comparison),
        "Memory": _memory(comparison),
        "Where the time went": _stages(comparison),
        "Load, failures and CPU": _loads(comparison),
        "Failed blocks": _failures(comparison),
        "Every metric": _every_metric(findings),
        "What was compared": _arms(comparison),
    }
    return [_table(title, rows) for title, found in by_title.items() if (rows := list(found))]


def _table(title: str, rows: list[dict[str, str]]) -> Table:
    text = [number for number, heading in enumerate(rows[0]) if heading in _TEXT]
    return Table(title=title, headings=list(rows[0]), rows=[list(row.values()) for row in rows], text=text)


def _capacity(comparison: Comparison) -> _Rows:
    for arm in comparison.plan.arms:
        found = [search for search in comparison.capacity_searches if search.arm == arm.label]
        rates = [search.rate for search in found if search.rate is not None]
        reasons = dict.fromkeys(search.reason for search in found if search.reason)
        remark = "not even the lowest rate that was tried kept it" if 0 in rates else ""
        if found:
            yield {
                "arm": arm.label,
                "images/s, median": number(median(rates)),
                "smallest–largest": span(rates),
                "searches": f"{len(rates)} of {len(found)}",
                "remark": "; ".join(reasons) or remark,
            }


def _memory(comparison: Comparison) -> _Rows:
    for arm in comparison.plan.arms:
        blocks = comparison.blocks_of(arm.label)
        peaks = {name: [block.loads[name].peak_bytes for block in blocks if name in block.loads] for name in LOADS}
        devices = [max((load.device_bytes or 0 for load in block.loads.values()), default=0) for block in blocks]
        yield {
            "arm": arm.label,
            "idle": _median((block.idle_bytes for block in blocks), unit=1e6),
            **{f"peak at {load_name(comparison, name)}": _median(found, unit=1e6) for name, found in peaks.items()},
            "after all loads": _median((block.after_bytes for block in blocks), unit=1e6),
            **({"peak on the GPU": _median(devices, unit=1e6)} if True in uses_device(comparison) else {}),
        }


def _stages(comparison: Comparison) -> _Rows:
    measured = loads_of(comparison)
    names = dict.fromkeys(name for _, _, loads in measured for load in loads for name in load.stages_ms)
    names.pop("total", None)
    for label, name, loads in measured:
        parts = {part: median(load.stages_ms.get(part) for load in loads) for part in names}
        total = median(load.stages_ms.get("total") for load in loads)
        rest = None if total is None else total - sum(value or 0.0 for value in parts.values())
        if total or any(parts.values()):
            times = {part: number(value) for part, value in {**parts, "rest": rest, "total": total}.items()}
            yield {"arm": label, "load": load_name(comparison, name), **times}


def _loads(comparison: Comparison) -> _Rows:
    for label, name, loads in loads_of(comparison):
        answered, opened = [load.throughput for load in loads], loads[0].mode == "open"
        yield {
            "arm": label,
            "load": load_name(comparison, name),
            "offered/s": _median(load.offered_rate for load in loads),
            "answered/s (blocks)": f"{number(median(answered))} ({span(answered)})",
            "requests": f"{sum(len(load.latencies_ms) for load in loads):,}",
            "errors": f"{sum(load.errors for load in loads):,}",
            "unsent": f"{sum(load.unsent_arrivals for load in loads):,}" if opened else UNKNOWN,
            "late": f"{sum(load.late_arrivals for load in loads):,}" if opened else UNKNOWN,
            "server cores": _median(load.server_cores for load in loads),
            "generator cores": _median(load.generator_cores for load in loads),
        }


def _median(values: Iterable[float | None], *, unit: float = 1.0) -> str:
    """Of the values that are known, and so not 0."""
    return number(median(value / unit for value in values if value))


def _failures(comparison: Comparison) -> _Rows:
    for block in comparison.failures:
        yield {"arm": block.arm, "round": str(block.round + 1), "reason": block.failure or ""}


def _every_metric(findings: Findings) -> _Rows:
    for row in findings.rows:
        estimate, interval = change_texts(row.metric, row.change) if row.change else (UNKNOWN, UNKNOWN)
        p_value = f"{row.change.p_value:.3f}" if row.change and row.change.p_value >= 0.0005 else "<0.001"
        yield {
            "metric": row.metric.heading,
            "arm": row.arm,
            "value": value_text(row.metric, row.value),
            "blocks": range_text(row),
            "change": estimate,
            "interval": interval,
            "confidence": f"{row.change.level:.2%}" if row.change else UNKNOWN,
            "adjusted p": p_value if row.change else UNKNOWN,
            "verdict": row.verdict or UNKNOWN,
        }


def _arms(comparison: Comparison) -> _Rows:
    for arm in comparison.plan.arms:
        info, blocks = model_info(comparison, arm.label), comparison.blocks_of(arm.label)
        loads = [load for block in blocks for load in block.loads.values()]
        labelled, correct = sum(load.labelled for load in loads), sum(load.correct for load in loads)
        yield {
            "arm": arm.label,
            "what differs": _arm_text(arm),
            "precision": str(info.get("precision") or UNKNOWN),
            "parameters, M": _median([info.get("params")], unit=1e6),
            "MACs, M": _median([info.get("macs")], unit=1e6),
            "image, px": f"{info['img_size']}×{info['img_size']}" if info.get("img_size") else UNKNOWN,
            "top-1 (manifest)": f"{info['accuracy']['top1']:.2%}" if info.get("accuracy") else UNKNOWN,
            "right answers in this run": f"{correct / labelled:.2%} of {labelled:,}" if labelled else UNKNOWN,
            "blocks": str(len(blocks)),
        }


def _arm_text(arm: Arm) -> str:
    """What distinguishes an arm, beside its label."""
    parts = [arm.model if arm.model != arm.label else ""]
    parts += [f"{name}={value}" for name, value in arm.settings]
    parts += [f"server at {arm.url}" if arm.url else "", f"service of commit {arm.commit}" if arm.commit else ""]
    parts.append(f"the same as {arm.repeat_of}, to show the noise" if arm.repeat_of else "")
    return ", ".join(filter(None, parts)) or UNKNOWN


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
