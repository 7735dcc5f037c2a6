"""The tables of a comparison as text, cell by cell, for the page, Markdown and the terminal alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtests.experiment.model import LOADS, Comparison
from loadtests.generator.load_result import LoadResult
from loadtests.report.figures import (
    UNKNOWN,
    estimate_text,
    headline,
    info_of,
    interval_text,
    load_name,
    median,
    metric_name,
    number,
    ordered,
    range_text,
    unit,
    value_text,
)
from loadtests.report.verdicts import Figure, Findings, Metric, Row, Verdict
from loadtests.report.words import arm_text


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure of the verdict table; all but `value` are empty where nothing was compared."""

    value: str
    estimate: str = ""
    interval: str = ""
    verdict: Verdict | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the verdict table."""

    label: str
    mark: str
    """`baseline`, `noise floor`, or nothing."""
    kv_tokens: str
    cells: list[Cell]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Plain text: the first `left` columns and the last `right` ones are words, the others numbers."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int = 1
    right: int = 0
    note: str = ""

    def is_words(self, column: int) -> bool:
        """Whether a column, counted from 0, holds words."""
        return column < self.left or column >= len(self.headings) - self.right


def verdict_headings(comparison: Comparison, findings: Findings) -> list[str]:
    """Of the columns after the label and the K/V tokens."""
    return [_heading(comparison, metric) for metric in headline(findings)]


def _heading(comparison: Comparison, metric: Metric) -> str:
    name = metric_name(comparison, metric)
    if metric.key == "throughput":
        return name
    return f"{name}, {'%' if metric.key == 'top1' else unit(metric)}"


def verdict_lines(comparison: Comparison, findings: Findings) -> list[Line]:
    """A row an arm; the baseline first, the A/A arm last."""
    return [
        Line(
            label=row.arm.label,
            mark="noise floor" if row.arm.repeat_of is not None else "" if place else "baseline",
            kv_tokens=_kv_tokens(comparison, row),
            cells=[_cell(comparison, metric, row) for metric in headline(findings)],
        )
        for place, row in enumerate(ordered(findings))
    ]


def _kv_tokens(comparison: Comparison, row: Row) -> str:
    info = info_of(comparison, row.arm.label)
    return f"{info['kv_tokens']} of {info['tokens']}" if info.get("kv_tokens") and info.get("tokens") else UNKNOWN


def _cell(comparison: Comparison, metric: Metric, row: Row) -> Cell:
    figure = row.figures.get(metric.key, Figure(value=None, smallest=None, largest=None, change=None))
    if metric.key == "top1" and figure.value is None:
        info = info_of(comparison, row.arm.label)
        return Cell(value="random weights" if info and not info.get("accuracy") else UNKNOWN)
    if figure.change is None:
        return Cell(value=value_text(metric, figure.value))
    return Cell(
        value=value_text(metric, figure.value),
        estimate=estimate_text(metric, figure.change),
        interval=interval_text(metric, figure.change),
        verdict=figure.change.verdict,
    )


def details(comparison: Comparison, findings: Findings) -> Table:
    """Every figure that was compared, p95 among them."""
    rows = []
    for metric in findings.metrics:
        for row in ordered(findings):
            figure = row.figures.get(metric.key)
            if figure is None:
                continue
            change = figure.change
            compared = (
                (
                    estimate_text(metric, change),
                    interval_text(metric, change),
                    f"{change.level:.2%}",
                    f"{change.p_value:.3f}" if change.p_value >= 0.0005 else "<0.001",
                    change.verdict,
                )
                if change
                else (UNKNOWN,) * 5
            )
            values = (value_text(metric, figure.value), range_text(metric, figure) or UNKNOWN)
            rows.append((_heading(comparison, metric), row.arm.label, *values, *compared))
    headings = ("figure", "arm", "value", "blocks", "change", "interval", "confidence", "adjusted p", "verdict")
    return Table(headings=headings, rows=rows, left=2, right=1)


def arms(comparison: Comparison) -> Table:
    """What was compared."""
    rows = []
    for arm in comparison.plan.arms:
        info = info_of(comparison, arm.label)
        size = info.get("image_size")
        accuracy = info.get("accuracy") or {}
        blocks = comparison.blocks_of(arm.label)
        labelled = sum(load.labelled for block in blocks for load in block.loads.values())
        correct = sum(load.correct for block in blocks for load in block.loads.values())
        rows.append(
            (
                arm.label,
                arm_text(arm),
                str(info.get("precision") or UNKNOWN),
                _millions(info.get("parameters")),
                _millions(info.get("macs")),
                f"{size}×{size}" if size else UNKNOWN,
                f"{accuracy['top1']:.2%}" if accuracy.get("top1") is not None else UNKNOWN,
                f"{correct / labelled:.2%} of {labelled:,}" if labelled else UNKNOWN,
                str(len(blocks)),
            )
        )
    model = ("precision", "parameters, M", "MACs, M", "image, px")
    headings = ("arm", "what differs", *model, "top-1 (manifest)", "right answers in this run", "blocks")
    return Table(headings=headings, rows=rows, left=2)


def _millions(value: float | None) -> str:
    return UNKNOWN if value is None else number(value / 1e6)


def failures(comparison: Comparison) -> Table:
    """Blocks that could not be measured to their end."""
    failed = [block for block in comparison.blocks if block.failure is not None]
    rows = [(block.arm, str(block.round + 1), block.failure or "") for block in failed]
    return Table(headings=("arm", "round", "why"), rows=rows, left=3)


def searches(comparison: Comparison) -> Table:
    """The largest rate of arrivals that keeps the objective."""
    rows = []
    for arm in comparison.plan.arms:
        found = [search for search in comparison.capacity_searches if search.arm == arm.label]
        rates = [search.rate for search in found if search.rate is not None]
        if not found:
            continue
        reasons = list(dict.fromkeys(search.reason for search in found if search.reason))
        middle = median(rates)
        rows.append(
            (
                arm.label,
                UNKNOWN if middle is None else number(middle),
                f"{number(min(rates))}–{number(max(rates))}" if rates else UNKNOWN,
                f"{len(rates)} of {len(found)}",
                "; ".join(reasons) or ("not even the lowest rate tried kept it" if 0 in rates else ""),
            )
        )
    headings = ("arm", "images/s, median", "smallest–largest", "rounds", "remark")
    plan = comparison.plan
    note = f"The objective: p{plan.objective_percentile:g} at or under {plan.objective_ms:g} ms, open loop."
    return Table(headings=headings, rows=rows, right=1, note=note)


def memory(comparison: Comparison) -> Table:
    """MB of the process tree, and on the GPU where there is one."""
    rows = []
    for arm in comparison.plan.arms:
        blocks = comparison.blocks_of(arm.label)
        loads = [[block.loads[name] for block in blocks if name in block.loads] for name in LOADS]
        devices = [
            max(used)
            for block in blocks
            if (used := [load.device_bytes for load in block.loads.values() if load.device_bytes is not None])
        ]
        rows.append(
            (
                arm.label,
                _megabytes([block.idle_bytes for block in blocks]),
                *(_megabytes([load.peak_bytes for load in measured]) for measured in loads),
                _megabytes([block.after_bytes for block in blocks]),
                _megabytes(devices),
            )
        )
    peaks = [f"peak at {load_name(comparison, name)}" for name in LOADS]
    headings = ["arm", "idle", *peaks, "after all loads", "peak on the GPU"]
    if all(row[-1] == UNKNOWN for row in rows):
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    note = "MB, median of the blocks: of the service's whole process tree, each page counted once (PSS)."
    return Table(headings=tuple(headings), rows=rows, note=note)


def _megabytes(values: list[int]) -> str:
    middle = median(value for value in values if value)
    return UNKNOWN if middle is None else number(middle / 1e6)


def stages(comparison: Comparison) -> Table:
    """The server's own mean times of an image, by stage."""
    measured = _by_load(comparison)
    names = list(dict.fromkeys(name for _, _, loads in measured for load in loads for name in load.stages_ms))
    parts = [name for name in names if name != "total"]
    rows = []
    for label, name, loads in measured:
        times = {stage: median(load.stages_ms[stage] for load in loads if stage in load.stages_ms) for stage in names}
        if not any(times.values()):
            continue
        total, known = times.get("total"), [times[part] or 0.0 for part in parts]
        rest = (number(total - sum(known)), number(total)) if total is not None else (UNKNOWN, UNKNOWN)
        cells = ["–" if times[part] is None else number(times[part] or 0.0) for part in parts]
        rows.append((label, load_name(comparison, name), *cells, *rest))
    note = (
        "Mean ms of an image by the server's own clocks, median of the blocks. “Rest” is what the total holds beside "
        "the stages: reading the request, answering, and waiting for the event loop. What a client sees beyond the "
        "total is the network and the queue in front of the server."
    )
    return Table(headings=("arm", "load", *parts, "rest", "total"), rows=rows, left=2, note=note)


def loads(comparison: Comparison) -> Table:
    """What each load asked for and got, and who had to work how much for it."""
    rows = []
    for label, name, measured in _by_load(comparison):
        offered = median(load.offered_rate for load in measured if load.offered_rate is not None)
        answered = [load.throughput for load in measured]
        opened = any(load.offered_rate is not None for load in measured)
        rows.append(
            (
                label,
                load_name(comparison, name),
                UNKNOWN if offered is None else number(offered),
                f"{number(median(answered) or 0.0)} ({number(min(answered))}–{number(max(answered))})",
                f"{sum(len(load.latencies_ms) for load in measured):,}",
                f"{sum(load.errors for load in measured):,}",
                f"{sum(load.unsent_arrivals for load in measured):,}" if opened else UNKNOWN,
                f"{sum(load.late_arrivals for load in measured):,}" if opened else UNKNOWN,
                _cores(measured, lambda load: load.server_cores),
                _cores(measured, lambda load: load.generator_cores),
            )
        )
    counts = ("requests", "errors", "unsent", "late")
    headings = ("arm", "load", "offered/s", "answered/s (blocks)", *counts, "server cores", "generator cores")
    note = (
        "Counts over all blocks, without the warm-up; the late were sent 5 ms or more after their moment. "
        "Cores are CPU time by wall time, median of the blocks: where the generator's come near a whole core, "
        "it may be the limit, and not the server."
    )
    return Table(headings=headings, rows=rows, left=2, note=note)


def _cores(measured: list[LoadResult], of: Callable[[LoadResult], float]) -> str:
    middle = median(map(of, measured))
    return f"{middle:.2f}" if middle else UNKNOWN


def _by_load(comparison: Comparison) -> list[tuple[str, str, list[LoadResult]]]:
    by_load = [
        (arm.label, name, [block.loads[name] for block in comparison.blocks_of(arm.label) if name in block.loads])
        for name in LOADS
        for arm in comparison.plan.arms
    ]
    return [(label, name, measured) for label, name, measured in by_load if measured]


def environment(comparison: Comparison) -> list[tuple[str, str]]:
    """Where it was measured, and which weights."""
    facts = list(comparison.environment.items())
    for arm in comparison.plan.arms:
        info = info_of(comparison, arm.label)
        source = info.get("source") or {}
        said = [
            f"checkpoint sha256 {source['checkpoint_sha256']}" if source.get("checkpoint_sha256") else "",
            f"exported at commit {source['git_commit']}" if source.get("git_commit") else "",
            f"sha256 {info['sha256']}" if info.get("sha256") else "",
        ]
        if any(said) and arm.repeat_of is None:
            facts.append((arm.label, ", ".join(filter(None, said))))
    return facts
