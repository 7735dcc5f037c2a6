"""All arms side by side in one picture that stands alone: throughput, memory, and latency under both open loops."""

import math
import textwrap
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.experiment.model import HIGH, MODERATE, Comparison
from loadtests.experiment.schedule import without_repeats
from loadtests.report.format import median, number, span, tokens_text
from loadtests.report.plot_style import FAINT, INK, SMALL, WIDTH, small_print, styles
from loadtests.report.rendering import sentences
from loadtests.report.verdicts import LATENCIES, THROUGHPUT, TOP1, Findings, Row, load_name, model_info

_LIGHT = 0.4
"""Opacity of the bar that stands for a p99, or for the memory that load adds."""
_LINE = 125
"""Letters of the small print in the width of the picture."""


class _Bar(NamedTuple):
    place: float
    row: Row | None
    colour: str
    opacity: float = 1.0
    before: str = ""
    """Before the number at its end."""


def variants(comparison: Comparison, findings: Findings) -> Figure:
    """Bars from zero, with the range of the blocks; the A/A arm is left out."""
    labels = [arm.label for arm in without_repeats(comparison.plan)]
    colours = [styles(comparison.plan)[label].colour for label in labels]
    figure = Figure(figsize=(WIDTH, 2.2 + 0.98 * len(labels)), layout="constrained")
    (speed, memory), (moderate, high) = figure.subplots(2, 2, sharey="row", height_ratios=[0.85, 1])
    speed.set_title("Throughput at saturation, images/s")
    _bars(speed, [_Bar(at, findings.row(label, THROUGHPUT), colours[at]) for at, label in enumerate(labels)], 0.6)
    memory.set_title("Memory, MB: idle (solid), peak (light)")
    blocks = [comparison.blocks_of(label) for label in labels]
    idle = [median(block.idle_bytes / 1e6 for block in one if block.idle_bytes) for one in blocks]
    rows = [findings.row(label, findings.memory) for label in labels]
    before = [f"{number(value)} → " if value else "" for value in idle]
    peaks = [_Bar(at, row, colours[at], _LIGHT, before[at]) for at, row in enumerate(rows)]
    _bars(memory, peaks, 0.6, room=1.4)
    memory.barh(range(len(labels)), [value or 0.0 for value in idle], height=0.6, color=colours)
    for axes, load in ((moderate, MODERATE), (high, HIGH)):
        axes.set_title(f"Latency at {load_name(comparison, load)}, ms: p50 (solid), p99 (light)")
        p50, _, p99 = (metric for metric in LATENCIES if metric.load == load)
        bars = [_Bar(at - 0.2, findings.row(label, p50), colours[at]) for at, label in enumerate(labels)]
        bars += [_Bar(at + 0.2, findings.row(label, p99), colours[at], _LIGHT) for at, label in enumerate(labels)]
        _bars(axes, bars, 0.36)
    for axes in (speed, memory, moderate, high):
        axes.grid(visible=True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_color(INK)
    speed.set_yticks(range(len(labels)), [_name(comparison, findings, label) for label in labels], fontsize=SMALL)
    moderate.set_yticks(range(len(labels)), ["\n".join(textwrap.wrap(label, 24)) for label in labels], fontsize=SMALL)
    for axes in (speed, moderate):
        axes.set_ylim(len(labels) - 0.45, -0.55)
    figure.suptitle("Throughput, memory and latency side by side", x=0.01, ha="left", fontsize=12, fontweight="bold")
    small_print(figure, _caption(comparison, labels))
    return figure


def _name(comparison: Comparison, findings: Findings, label: str) -> str:
    info, top1 = model_info(comparison, label), findings.value(label, TOP1)
    facts = [f"K/V {tokens}"] if (tokens := tokens_text(info)) else []
    facts += [f"top-1 {top1:.1f}%"] if top1 is not None else []
    return "\n".join(filter(None, (*textwrap.wrap(label, 24), ", ".join(facts))))


def _bars(axes: Axes, bars: list[_Bar], height: float, *, room: float = 1.2) -> None:
    """An infinite bar or whisker passes through the edge of the plot; a bar says so."""
    ends = [end for bar in bars if bar.row for end in (bar.row.value, bar.row.largest) if end is not None]
    edge = max((end for end in ends if math.isfinite(end)), default=1.0) or 1.0
    style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": SMALL}
    for place, row, colour, opacity, before in bars:
        if row is None or row.value is None:
            text = " unknown" if row is None or row.metric.rank is None else " too few samples"
            axes.text(0, place, text, va="center", fontsize=SMALL, color=FAINT)
        elif math.isinf(row.value):
            axes.barh(place, edge * 2, height=height, color=colour, alpha=opacity, hatch="///", edgecolor="white")
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.annotate("∞: requests not answered", (0, place), xytext=(4, 0), bbox=box, **style)
        else:
            whisker = row.ends[0], min(row.ends[1], edge * 2)
            axes.barh(place, row.value, height=height, color=colour, alpha=opacity)
            axes.hlines(place, *whisker, color=INK, linewidth=1)
            axes.vlines(whisker, place - height / 5, place + height / 5, color=INK, linewidth=1)
            axes.annotate(before + number(row.value), (min(whisker[1], edge), place), xytext=(4, 0), **style)
    axes.set_xlim(0, edge * room)


def _caption(comparison: Comparison, labels: list[str]) -> str:
    infos = [info for label in labels if (info := model_info(comparison, label))]
    sizes = sorted({f"{info['img_size']}×{info['img_size']} px" for info in infos if info.get("img_size")})
    lines = sentences(
        "variants_caption.txt.j2",
        params=span([info["params"] / 1e6 for info in infos if info.get("params")]),
        sizes=sizes,
        random=infos and not any(info.get("accuracy") for info in infos),
        environment=comparison.environment,
        blocks=sorted({len(comparison.blocks_of(label)) for label in labels}),
    )
    return "\n".join(line for text in lines for line in textwrap.wrap(text, _LINE))
