"""The tables of a comparison: the verdicts first, then one for each question that a reader may ask."""

from collections.abc import Iterable

from loadtests.experiment.model import LOADS, Arm, Comparison
from loadtests.report.format import estimate_text, interval_text, median, number, range_text, span, value_text
from loadtests.report.prose import conditions, top1_note
from loadtests.report.rendering import UNKNOWN, Cell, Table, Tone
from loadtests.report.verdicts import TOP1, Findings, Metric, Verdict, load_name, loads_of, model_info, uses_device

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
        _every_metric(findings),
        _arms(comparison),
    ]
    return [table for table in tables if table.rows]


def _table(title: str, rows: list[dict[str, str]], *, text: tuple[int, ...] = (0,), note: str = "") -> Table:
    """From rows by heading."""
    headings = list(rows[0]) if rows else []
    return Table(title=title, headings=headings, rows=[list(row.values()) for row in rows], text=text, note=note)


def _capacity(comparison: Comparison) -> Table:
    plan, rows = comparison.plan, []
    for arm in plan.arms:
        found = [search for search in comparison.capacity_searches if search.arm == arm.label]
        rates = [search.rate for search in found if search.rate is not None]
        reasons = dict.fromkeys(search.reason for search in found if search.reason)
        row = {
            "arm": arm.label,
            "images/s, median": number(median(rates)),
            "smallest–largest": span(rates),
            "searches": f"{len(rates)} of {len(found)}",
            "remark": "; ".join(reasons) or ("not even the lowest rate that was tried kept it" if 0 in rates else ""),
        }
        rows += [row] if found else []
    note = f"The objective: p{plan.objective_percentile:g} at or under {plan.objective_ms:g} ms, open loop."
    return _table("Largest rate that keeps the objective", rows, text=(0, -1), note=note)


def _memory(comparison: Comparison) -> Table:
    rows = []
    for arm in comparison.plan.arms:
        blocks = comparison.blocks_of(arm.label)
        loads = {name: [block.loads[name] for block in blocks if name in block.loads] for name in LOADS}
        peaks = {
            f"peak at {load_name(comparison, name)}": _megabytes(load.peak_bytes for load in found)
            for name, found in loads.items()
        }
        devices = [max((load.device_bytes or 0 for load in block.loads.values()), default=0) for block in blocks]
        rows.append(
            {
                "arm": arm.label,
                "idle": _megabytes(block.idle_bytes for block in blocks),
                **peaks,
                "after all loads": _megabytes(block.after_bytes for block in blocks),
                **({"peak on the GPU": _megabytes(devices)} if True in uses_device(comparison) else {}),
            }
        )
    note = "MB, median of the blocks: of the service's whole process tree, each shared page counted once (PSS)."
    return _table("Memory", rows, note=note)


def _megabytes(values: Iterable[int]) -> str:
    middle = median(value for value in values if value)
    return UNKNOWN if middle is None else number(middle / 1e6)


def _stages(comparison: Comparison) -> Table:
    measured = loads_of(comparison)
    names = dict.fromkeys(
        name for _, _, loads in measured for load in loads for name in load.stages_ms if name != "total"
    )
    rows = []
    for label, name, loads in measured:
        parts = {part: median(load.stages_ms.get(part) for load in loads) for part in names}
        total = median(load.stages_ms.get("total") for load in loads)
        rest = None if total is None else total - sum(value or 0.0 for value in parts.values())
        times = {part: number(value) for part, value in {**parts, "rest": rest, "total": total}.items()}
        rows += [{"arm": label, "load": load_name(comparison, name), **times}] if total or any(parts.values()) else []
    note = (
        "Mean ms per image by the server's own clocks, median of the blocks. “Rest” is the part of the total outside "
        "the stages: reading the request, answering, and waiting for the event loop. What a client sees beyond the "
        "total is the network and the queue in front of the server."
    )
    return _table("Where the time went", rows, text=(0, 1), note=note)


def _loads(comparison: Comparison) -> Table:
    rows = []
    for label, name, loads in loads_of(comparison):
        answered, opened = [load.throughput for load in loads], loads[0].mode == "open"
        rows.append(
            {
                "arm": label,
                "load": load_name(comparison, name),
                "offered/s": number(median(load.offered_rate for load in loads)),
                "answered/s (blocks)": f"{number(median(answered))} ({span(answered)})",
                "requests": f"{sum(len(load.latencies_ms) for load in loads):,}",
                "errors": f"{sum(load.errors for load in loads):,}",
                "unsent": f"{sum(load.unsent_arrivals for load in loads):,}" if opened else UNKNOWN,
                "late": f"{sum(load.late_arrivals for load in loads):,}" if opened else UNKNOWN,
                "server cores": _cores(load.server_cores for load in loads),
                "generator cores": _cores(load.generator_cores for load in loads),
            }
        )
    note = (
        "Counts over all blocks, without the warm-up; late requests were sent 5 ms or more after their moment. Cores "
        "are CPU time by wall time, median of the blocks: a generator near a whole core may be the limit, not the "
        "server."
    )
    return _table("Load, failures and CPU", rows, text=(0, 1), note=note)


def _cores(values: Iterable[float]) -> str:
    middle = median(values)
    return f"{middle:.2f}" if middle else UNKNOWN


def _failures(comparison: Comparison) -> Table:
    rows = [
        {"arm": block.arm, "round": str(block.round + 1), "reason": block.failure}
        for block in comparison.blocks
        if block.failure is not None
    ]
    return _table("Failed blocks", rows, text=(0, 1, 2))


def _every_metric(findings: Findings) -> Table:
    rows = []
    for row in findings.rows:
        metric, change = row.metric, row.change
        p_value = f"{change.p_value:.3f}" if change and change.p_value >= 0.0005 else "<0.001"
        rows.append(
            {
                "metric": metric.heading,
                "arm": row.arm,
                "value": value_text(metric, row.value),
                "blocks": range_text(row),
                "change": estimate_text(metric, change) if change else UNKNOWN,
                "interval": interval_text(metric, change) if change else UNKNOWN,
                "confidence": f"{change.level:.2%}" if change else UNKNOWN,
                "adjusted p": p_value if change else UNKNOWN,
                "verdict": change.verdict if change else UNKNOWN,
            }
        )
    return _table("Every metric", rows, text=(0, 1, -1))


def _arms(comparison: Comparison) -> Table:
    rows = []
    for arm in comparison.plan.arms:
        info, blocks = model_info(comparison, arm.label), comparison.blocks_of(arm.label)
        loads = [load for block in blocks for load in block.loads.values()]
        labelled, correct = sum(load.labelled for load in loads), sum(load.correct for load in loads)
        rows.append(
            {
                "arm": arm.label,
                "what differs": _arm_text(arm),
                "precision": str(info.get("precision") or UNKNOWN),
                "parameters, M": number(info["params"] / 1e6 if info.get("params") else None),
                "MACs, M": number(info["macs"] / 1e6 if info.get("macs") else None),
                "image, px": f"{info['img_size']}×{info['img_size']}" if info.get("img_size") else UNKNOWN,
                "top-1 (manifest)": f"{info['accuracy']['top1']:.2%}" if info.get("accuracy") else UNKNOWN,
                "right answers in this run": f"{correct / labelled:.2%} of {labelled:,}" if labelled else UNKNOWN,
                "blocks": str(len(blocks)),
            }
        )
    return _table("What was compared", rows, text=(0, 1))


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
