"""All arms side by side in one picture that stands alone: throughput, memory, and latency under both open loops."""

import math
import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.experiment.model import HIGH, MODERATE, Comparison
from loadtests.report import verdicts
from loadtests.report.figures import info_of, load_name, median, number
from loadtests.report.plot_style import FAINT, INK, WIDTH, styles, wrapped
from loadtests.report.verdicts import Findings, Row

_LIGHT = 0.4
"""Opacity of the bar that stands for a p99, or for the memory that load adds."""

_LINE = 125
"""Letters of the small print in the width of the picture."""


def variants(comparison: Comparison, findings: Findings) -> Figure:
    """Bars from zero, with the range of the blocks; the A/A arm is left out."""
    rows = [row for row in findings.rows if row.arm.repeat_of is None]
    figure = Figure(figsize=(WIDTH, 2.2 + 0.98 * len(rows)), layout="constrained")
    (speed, memory), (moderate, high) = figure.subplots(2, 2, sharey="row", height_ratios=[0.85, 1])
    colours = [styles(comparison.plan)[row.arm.label].colour for row in rows]
    speed.set_title("Throughput at saturation, images/s")
    _bars(speed, [(place, row.figures.get("throughput"), colours[place], 1.0) for place, row in enumerate(rows)], 0.6)
    _memory(memory, comparison, rows, colours)
    for axes, load in ((moderate, MODERATE), (high, HIGH)):
        axes.set_title(f"Latency at {load_name(comparison, load)}, ms: p50 (solid), p99 (light)")
        p50 = [(place - 0.2, row.figures.get(f"{load}_p50"), colours[place], 1.0) for place, row in enumerate(rows)]
        p99 = [(place + 0.2, row.figures.get(f"{load}_p99"), colours[place], _LIGHT) for place, row in enumerate(rows)]
        _bars(axes, p50 + p99, 0.36)
    for axes in (speed, memory, moderate, high):
        axes.grid(visible=True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_color(INK)
    speed.set_yticks(range(len(rows)), [_name(comparison, row) for row in rows], fontsize=8)
    moderate.set_yticks(range(len(rows)), [wrapped(row.arm.label) for row in rows], fontsize=8)
    for axes in (speed, moderate):
        axes.set_ylim(len(rows) - 0.45, -0.55)
    figure.suptitle("Throughput, memory and latency side by side", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(_small_print(comparison, rows), x=0.01, ha="left", fontsize=7.5, color=FAINT)
    return figure


def _name(comparison: Comparison, row: Row) -> str:
    info, top1 = info_of(comparison, row.arm.label), row.figures.get("top1")
    facts = []
    if info.get("kv_tokens") and info.get("tokens"):
        facts.append(f"K/V {info['kv_tokens']} of {info['tokens']}")
    if top1 and top1.value is not None:
        facts.append(f"top-1 {top1.value:.1%}")
    return "\n".join(filter(None, (wrapped(row.arm.label), ", ".join(facts))))


def _memory(axes: Axes, comparison: Comparison, rows: list[Row], colours: list[str]) -> None:
    axes.set_title("Memory, MB: idle (solid), peak (light)")
    edge = 0.0
    for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        figure = row.figures.get("peak_bytes")
        idle = median(block.idle_bytes / 1e6 for block in comparison.blocks_of(row.arm.label) if block.idle_bytes)
        if figure is None or not figure.value:
            axes.text(0, place, " not known", va="center", fontsize=8, color=FAINT)
            continue
        peak = figure.value / 1e6
        axes.barh(place, peak, height=0.6, color=colour, alpha=_LIGHT)
        axes.barh(place, min(idle or 0.0, peak), height=0.6, color=colour)
        ends = [peak if end is None else end / 1e6 for end in (figure.smallest, figure.largest)]
        _whisker(axes, place, ends[0], ends[1], 0.6)
        _label(axes, ends[1], place, f"{number(idle)} → {number(peak)}" if idle else number(peak))
        edge = max(edge, *ends)
    axes.set_xlim(0, (edge or 1.0) * 1.4)


def _bars(axes: Axes, bars: list[tuple[float, verdicts.Figure | None, str, float]], height: float) -> None:
    """An infinite bar goes through the plot's edge and says so; so does a whisker, without words."""
    ends = [end for _, figure, _, _ in bars if figure for end in (figure.value, figure.largest) if end is not None]
    edge = max((end for end in ends if math.isfinite(end)), default=1.0) or 1.0
    for place, figure, colour, alpha in bars:
        if figure is None or figure.value is None:
            axes.text(0, place, " too few samples", va="center", fontsize=8, color=FAINT)
        elif math.isinf(figure.value):
            axes.barh(place, edge * 2, height=height, color=colour, alpha=alpha, hatch="///", edgecolor="white")
            _label(axes, 0, place, "∞: so many were not answered", boxed=True)
        else:
            axes.barh(place, figure.value, height=height, color=colour, alpha=alpha)
            smallest = figure.value if figure.smallest is None else figure.smallest
            largest = min(figure.value if figure.largest is None else figure.largest, edge * 2)
            _whisker(axes, place, smallest, largest, height)
            _label(axes, min(largest, edge), place, number(figure.value))
    axes.set_xlim(0, edge * 1.2)


def _whisker(axes: Axes, place: float, smallest: float, largest: float, height: float) -> None:
    axes.hlines(place, smallest, largest, color=INK, linewidth=1)
    axes.vlines([smallest, largest], place - height / 5, place + height / 5, color=INK, linewidth=1)


def _label(axes: Axes, at: float, place: float, text: str, *, boxed: bool = False) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1} if boxed else None
    axes.annotate(text, (at, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, bbox=box)


def _small_print(comparison: Comparison, rows: list[Row]) -> str:
    infos = [info for row in rows if (info := info_of(comparison, row.arm.label))]
    sizes = sorted({info["parameters"] / 1e6 for info in infos if info.get("parameters")})
    images = sorted({f"{info['image_size']}×{info['image_size']} px" for info in infos if info.get("image_size")})
    parameters = [f"{'–'.join(dict.fromkeys((number(sizes[0]), number(sizes[-1]))))} M parameters"] if sizes else []
    weights = ["random weights"] if infos and not any(info.get("accuracy") for info in infos) else []
    known = comparison.environment
    machine = [f"{known[name]}{' cores' * (name == 'cores')}" for name in ("cpu", "cores", "gpu") if known.get(name)]
    blocks = sorted({row.blocks for row in rows})
    counts = "–".join(dict.fromkeys((str(blocks[0]), str(blocks[-1])))) if blocks else "no"
    how = (
        f"{counts} blocks an arm, each a fresh server; whiskers: smallest and largest block. Percentiles: of all "
        "blocks, open loop, from the scheduled moment. The scales differ."
    )
    lines = [" · ".join([*parameters, *images, *weights, *machine]), how]
    return "\n".join(part for line in lines for part in textwrap.wrap(line, _LINE))
