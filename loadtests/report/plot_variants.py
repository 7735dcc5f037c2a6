"""All arms side by side in one picture that stands alone: throughput, memory, and latency under both open loops."""

import math
import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.experiment.model import HIGH, MODERATE, Comparison
from loadtests.report.format import load_name, median, number, span
from loadtests.report.plot_style import FAINT, INK, SMALL, WIDTH, shown, small_print, styles, wrapped
from loadtests.report.verdicts import LATENCIES, MEMORY, THROUGHPUT, TOP1, Findings, Row, model_info

_LIGHT = 0.4
"""Opacity of the bar that stands for a p99, or for the memory that load adds."""
_LINE = 125
"""Letters of the small print in the width of the picture."""


def variants(comparison: Comparison, findings: Findings) -> Figure:
    """Bars from zero, with the range of the blocks; the A/A arm is left out."""
    labels = [arm.label for arm in shown(comparison.plan)]
    colours = [styles(comparison.plan)[label].colour for label in labels]
    figure = Figure(figsize=(WIDTH, 2.2 + 0.98 * len(labels)), layout="constrained")
    (speed, memory), (moderate, high) = figure.subplots(2, 2, sharey="row", height_ratios=[0.85, 1])
    speed.set_title("Throughput at saturation, images/s")
    rows = [findings.row(label, THROUGHPUT) for label in labels]
    _bars(speed, [(place, row, colours[place], 1.0) for place, row in enumerate(rows)], 0.6)
    _memory(memory, comparison, [findings.row(label, MEMORY) for label in labels], colours)
    for axes, load in ((moderate, MODERATE), (high, HIGH)):
        axes.set_title(f"Latency at {load_name(comparison, load)}, ms: p50 (solid), p99 (light)")
        ranks = {metric.rank: metric for metric in LATENCIES if metric.load == load}
        bars = [
            (place + shift, findings.row(label, ranks[rank]), colours[place], opacity)
            for place, label in enumerate(labels)
            for rank, shift, opacity in ((50, -0.2, 1.0), (99, 0.2, _LIGHT))
        ]
        _bars(axes, bars, 0.36)
    for axes in (speed, memory, moderate, high):
        axes.grid(visible=True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_color(INK)
    speed.set_yticks(range(len(labels)), [_name(comparison, findings, label) for label in labels], fontsize=SMALL)
    moderate.set_yticks(range(len(labels)), [wrapped(label) for label in labels], fontsize=SMALL)
    for axes in (speed, moderate):
        axes.set_ylim(len(labels) - 0.45, -0.55)
    figure.suptitle("Throughput, memory and latency side by side", x=0.01, ha="left", fontsize=12, fontweight="bold")
    small_print(figure, _conditions(comparison, findings, labels))
    return figure


def _name(comparison: Comparison, findings: Findings, label: str) -> str:
    info, top1 = model_info(comparison, label), findings.value(label, TOP1)
    facts = [f"K/V {info['kv_tokens']} of {info['tokens']}"] if info.get("kv_tokens") and info.get("tokens") else []
    facts += [f"top-1 {top1:.1f}%"] if top1 is not None else []
    return "\n".join(filter(None, (wrapped(label), ", ".join(facts))))


def _memory(axes: Axes, comparison: Comparison, rows: list[Row | None], colours: list[str]) -> None:
    axes.set_title("Memory, MB: idle (solid), peak (light)")
    edge = 0.0
    for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        if row is None or not row.value:
            axes.text(0, place, " unknown", va="center", fontsize=SMALL, color=FAINT)
            continue
        idle = median(block.idle_bytes / 1e6 for block in comparison.blocks_of(row.arm) if block.idle_bytes)
        peak, smallest, largest = (value / 1e6 for value in (row.value, row.smallest or 0.0, row.largest or 0.0))
        axes.barh(place, peak, height=0.6, color=colour, alpha=_LIGHT)
        axes.barh(place, min(idle or 0.0, peak), height=0.6, color=colour)
        _whisker(axes, place, smallest, largest, 0.6)
        _label(axes, largest, place, f"{number(idle)} → {number(peak)}" if idle else number(peak))
        edge = max(edge, peak, largest)
    axes.set_xlim(0, (edge or 1.0) * 1.4)


def _bars(axes: Axes, bars: list[tuple[float, Row | None, str, float]], height: float) -> None:
    """(place, row, colour, opacity). An infinite bar or whisker passes through the edge of the plot; a bar says so."""
    ends = [end for _, row, _, _ in bars if row for end in (row.value, row.largest) if end is not None]
    edge = max((end for end in ends if math.isfinite(end)), default=1.0) or 1.0
    for place, row, colour, opacity in bars:
        if row is None or row.value is None:
            axes.text(0, place, " too few samples", va="center", fontsize=SMALL, color=FAINT)
        elif math.isinf(row.value):
            axes.barh(place, edge * 2, height=height, color=colour, alpha=opacity, hatch="///", edgecolor="white")
            _label(axes, 0, place, "∞: requests not answered", boxed=True)
        else:
            axes.barh(place, row.value, height=height, color=colour, alpha=opacity)
            smallest = row.value if row.smallest is None else row.smallest
            largest = min(row.value if row.largest is None else row.largest, edge * 2)
            _whisker(axes, place, smallest, largest, height)
            _label(axes, min(largest, edge), place, number(row.value))
    axes.set_xlim(0, edge * 1.2)


def _whisker(axes: Axes, place: float, smallest: float, largest: float, height: float) -> None:
    axes.hlines(place, smallest, largest, color=INK, linewidth=1)
    axes.vlines([smallest, largest], place - height / 5, place + height / 5, color=INK, linewidth=1)


def _label(axes: Axes, at: float, place: float, text: str, *, boxed: bool = False) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1} if boxed else None
    axes.annotate(text, (at, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=SMALL, bbox=box)


def _conditions(comparison: Comparison, findings: Findings, labels: list[str]) -> str:
    infos = [info for label in labels if (info := model_info(comparison, label))]
    sizes = [info["params"] / 1e6 for info in infos if info.get("params")]
    facts = [f"{span(sizes)} M parameters"] if sizes else []
    facts += sorted({f"{info['img_size']}×{info['img_size']} px" for info in infos if info.get("img_size")})
    facts += ["random weights"] if infos and not any(info.get("accuracy") for info in infos) else []
    known = comparison.environment
    facts += [f"{known[name]}{' cores' * (name == 'cores')}" for name in ("cpu", "cores", "gpu") if known.get(name)]
    blocks = sorted({counts.blocks for counts in findings.counts if counts.arm.label in labels})
    counts = "–".join(dict.fromkeys((str(blocks[0]), str(blocks[-1])))) if blocks else "no"
    how = (
        f"{counts} blocks per arm, each a fresh server; whiskers: smallest and largest block. Percentiles: over all "
        "blocks, open loop, from the scheduled moment. The scales differ."
    )
    return "\n".join(line for text in (" · ".join(facts), how) for line in textwrap.wrap(text, _LINE))
