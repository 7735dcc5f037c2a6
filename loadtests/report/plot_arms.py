"""Pictures of the arms, by what the report found: which one to choose, and all of them side by side."""

import math
import textwrap
from typing import Any, NamedTuple

import numpy as np
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.experiment.model import HIGH, MODERATE, Comparison
from loadtests.experiment.schedule import without_repeats
from loadtests.report.findings import LATENCIES, THROUGHPUT, TOP1, Findings, Metric, Row
from loadtests.report.plot_style import FAINT, INK, SMALL, WIDTH, Style, instead, small_print, styles
from loadtests.report.rendering import median, number, sentences, span
from loadtests.report.verdicts import load_name, model_info, tokens_text
from loadtests.statistics import wilson

_LARGEST = 900.0
"""Square points of the largest marker."""
_PLAIN = 120.0
"""Square points of a marker where there is nothing to be shown by area."""
_LIGHT = 0.4
"""Opacity of the bar that stands for a p99, or for the memory that load adds."""
_LINE = 125
"""Letters of the small print in the width of the picture."""

_Ends = tuple[float, float, float]
"""A value and both ends of its whisker."""


class _Point(NamedTuple):
    style: Style
    x: _Ends
    y: _Ends
    area: float
    """0 if it is unknown."""


def pareto(comparison: Comparison, findings: Findings) -> Figure:
    """The picture to choose by: accuracy against throughput, memory as area; without accuracies, memory by throughput.

    One point for each arm but the A/A arm; those that no other beats in both directions are joined.
    """
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    axes, looks = figure.subplots(), styles(comparison.plan)
    speeds, memory, known = (_ends(comparison, findings, one) for one in (THROUGHPUT, findings.memory, TOP1))
    top1 = {label: _top1(model_info(comparison, label)) for label in speeds if label in known}
    memory = {label: ends for label, ends in memory.items() if label in speeds}
    whiskers, areas = "Whiskers: slowest and fastest block", {}
    if len(top1) > 1 or (top1 and len(speeds) == 1):
        area, unit, areas = findings.memory.label, "MB", {label: ends[0] for label, ends in memory.items()}
        left_out = ", ".join(label for label in speeds if label not in top1)
        missing = f"; without accuracy, so not shown: {left_out}" if left_out else ""
        axes.set(title=f"Accuracy against throughput: up and to the right is better{missing}", ylabel=TOP1.heading)
        whiskers += "; upwards, 95 % interval of top-1 for that many test images"
    elif memory:
        area, unit, top1 = "", "ms", {}
        for tail in (metric for metric in findings.metrics if metric.rank == 99):
            values = {label: findings.value(label, tail) or 0.0 for label in memory}
            if all(map(math.isfinite, values.values())):
                area, areas = tail.label, values
        title = "Memory against throughput (accuracy unknown: random weights): down and to the right is better"
        axes.set(title=title, ylabel=findings.memory.heading)
    else:
        instead(axes, "Neither accuracy nor memory is known: nothing to weigh throughput against.")
        return figure
    points = [_Point(looks[one], speeds[one], ends, areas.get(one, 0.0)) for one, ends in (top1 or memory).items()]
    axes.set_xlabel("throughput at saturation, images/s")
    axes.grid(visible=True)
    small_print(figure, f"{whiskers}. Dashed: not beaten in both directions.")
    _draw(figure, axes, points, area, unit, up_is_better=bool(top1))
    return figure


def _ends(comparison: Comparison, findings: Findings, metric: Metric) -> dict[str, _Ends]:
    rows = [findings.row(arm.label, metric) for arm in without_repeats(comparison.plan)]
    return {row.arm: (row.value, *row.ends) for row in rows if row and row.value is not None}


def _top1(info: dict[str, Any]) -> _Ends:
    top1, count = info["accuracy"]["top1"], info["accuracy"]["n"]
    low, high = wilson(round(top1 * count), count)
    return 100 * top1, 100 * low, 100 * high


def _draw(figure: Figure, axes: Axes, points: list[_Point], area: str, unit: str, *, up_is_better: bool) -> None:
    front = _front(points, up_is_better=up_is_better)
    axes.plot([one.x[0] for one in front], [one.y[0] for one in front], color=FAINT, linewidth=1, linestyle="--")
    (x, left, right), (y, low, high) = np.array([one.x for one in points]).T, np.array([one.y for one in points]).T
    colours, largest = [one.style.colour for one in points], max(one.area for one in points)
    sizes = [_LARGEST * one.area / largest if largest else _PLAIN for one in points]
    axes.hlines(y, left, right, color=colours, linewidth=1.2)
    axes.vlines(x, low, high, color=colours, linewidth=1.2)
    markers = axes.scatter(x, y, s=sizes, color=colours, alpha=0.55, zorder=3)
    axes.scatter(x, y, s=5, color=INK, zorder=4)
    axes.margins(0.12, 0.2)
    if largest:
        _area_key(axes, f"Area: {area}", unit, largest)
    box: dict[str, Any] = {"facecolor": "white", "linewidth": 0.8, "alpha": 0.85, "pad": 2}
    labels = []
    for one in points:
        text = one.style.name + (f"\n{area} {number(one.area)} {unit}" if one.area else "")
        colour = {"edgecolor": one.style.colour}
        labels.append(axes.text(one.x[0], one.y[0], text, fontsize=SMALL, bbox=box | colour, zorder=5))
    # Where things lie is known only after the layout. A limit of steps, not of time, gives the same picture each time.
    figure.draw_without_rendering()
    line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.8}
    adjust_text(labels, objects=markers, ax=axes, expand=(1.1, 1.3), iter_lim=300, arrowprops=line)


def _front(points: list[_Point], *, up_is_better: bool) -> list[_Point]:
    """Those that no other equals or beats in both directions, from left to right."""
    sign = 1 if up_is_better else -1
    places = {(one.x[0], sign * one.y[0]): one for one in points}
    beaten = {one for one in places for other in places if one != other and one[0] <= other[0] and one[1] <= other[1]}
    return [places[place] for place in sorted(places.keys() - beaten)]


def _area_key(axes: Axes, title: str, unit: str, largest: float) -> None:
    power = 10 ** math.floor(math.log10(largest))
    most = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= largest)
    values = (most / 4, most / 2, most)
    handles = [axes.scatter([], [], s=_LARGEST * value / largest, color="#fff", edgecolors=FAINT) for value in values]
    room = {"labelspacing": 2.6, "borderpad": 1.4, "handletextpad": 1.4}
    names = [f"{number(value)} {unit}" for value in values]
    axes.legend(handles, names, title=title, loc="center left", bbox_to_anchor=(1.01, 0.5), **room)


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
