"""Pictures of the arms, by what the report found: which one to choose, and all of them side by side."""

import math
import textwrap
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.experiment.model import HIGH, MODERATE, Comparison
from loadtests.experiment.schedule import without_repeats
from loadtests.report.findings import LATENCIES, THROUGHPUT, TOP1, Findings, Metric, Row
from loadtests.report.plot_style import FAINT, INK, SMALL, WIDTH, instead, small_print, styles
from loadtests.report.rendering import median, number, sentences, span
from loadtests.report.verdicts import load_name, model_info, tokens_text
from loadtests.statistics import wilson

_LARGEST, _PLAIN = 900.0, 120.0
"""Area in square points of the largest marker, and of all markers if their area shows nothing."""
_LIGHT = 0.4
"""Opacity of the bar that stands for a p99, or for the memory that load adds."""
_LABEL, _LINE = 24, 125
"""Characters in a line beside the bars, and in one of the small print."""

_Floats = npt.NDArray[np.float64]


def pareto(comparison: Comparison, findings: Findings) -> Figure:
    """The picture to choose by: accuracy against throughput, memory as area; without accuracies, memory by throughput.

    One point for each arm but the A/A arm; those that no other beats in both directions are joined.
    """
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    axes = figure.subplots()
    speeds, memory = (_ends(comparison, findings, metric) for metric in (THROUGHPUT, findings.memory))
    infos = {label: model_info(comparison, label) for label in speeds}
    top1 = {label: _top1(info["accuracy"]) for label, info in infos.items() if info.get("accuracy")}
    heights = {label: ends for label, ends in memory.items() if label in speeds}
    whiskers, area, unit, areas = "Whiskers: slowest and fastest block", "", "ms", {}
    if by_top1 := len(top1) > 1 or len(top1) == len(speeds) == 1:
        heights, area, unit, areas = top1, findings.memory.label, "MB", {one: ends[0] for one, ends in memory.items()}
        left_out = ", ".join(label for label in speeds if label not in top1)
        missing = f"; without accuracy, so not shown: {left_out}" if left_out else ""
        axes.set(title=f"Accuracy against throughput: up and to the right is better{missing}", ylabel=TOP1.heading)
        whiskers += "; upwards, 95 % interval of top-1 for that many test images"
    elif heights:
        for tail in (metric for metric in findings.metrics if metric.rank == 99):
            values = {label: findings.value(label, tail) or 0.0 for label in heights}
            if all(map(math.isfinite, values.values())):
                area, areas = tail.label, values
        title = "Memory against throughput (accuracy unknown: random weights): down and to the right is better"
        axes.set(title=title, ylabel=findings.memory.heading)
    else:
        instead(axes, "Neither accuracy nor memory is known: nothing to weigh throughput against.")
        return figure
    axes.set_xlabel("throughput at saturation, images/s")
    axes.grid(visible=True)
    small_print(figure, f"{whiskers}. Dashed: not beaten in both directions.")
    looks = [styles(comparison.plan)[label] for label in heights]
    colours, sizes = [look.colour for look in looks], np.array([areas.get(label, 0.0) for label in heights])
    (x, left, right), (y, low, high) = (np.array([ends[one] for one in heights]).T for ends in (speeds, heights))
    front = _front(x, y if by_top1 else -y)
    axes.plot(x[front], y[front], color=FAINT, linewidth=1, linestyle="--")
    axes.hlines(y, left, right, color=colours, linewidth=1.2)
    axes.vlines(x, low, high, color=colours, linewidth=1.2)
    largest = float(sizes.max())
    shown = _LARGEST * sizes / largest if largest else _PLAIN
    markers = axes.scatter(x, y, s=shown, color=colours, alpha=0.55, zorder=3)
    axes.scatter(x, y, s=5, color=INK, zorder=4)
    axes.margins(0.12, 0.2)
    if largest:
        _area_key(axes, f"Area: {area}", unit, largest)
    labels = []
    for at, look in enumerate(looks):
        text = look.name + (f"\n{area} {number(sizes[at])} {unit}" if sizes[at] else "")
        box = {"facecolor": "white", "edgecolor": look.colour, "linewidth": 0.8, "alpha": 0.85, "pad": 2}
        labels.append(axes.text(x[at], y[at], text, fontsize=SMALL, bbox=box, zorder=5))
    # Positions are known only after the layout. A limit on steps instead of time gives the same picture each time.
    figure.draw_without_rendering()
    line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.8}
    adjust_text(labels, objects=markers, ax=axes, expand=(1.1, 1.3), iter_lim=300, arrowprops=line)
    return figure


def _ends(comparison: Comparison, findings: Findings, metric: Metric) -> dict[str, tuple[float, float, float]]:
    """A value and both ends of its whisker, by label."""
    rows = [findings.row(arm.label, metric) for arm in without_repeats(comparison.plan)]
    return {row.arm: (row.value, *row.ends) for row in rows if row and row.value is not None}


def _top1(accuracy: dict[str, Any]) -> tuple[float, float, float]:
    top1, count = accuracy["top1"], accuracy["n"]
    low, high = wilson(round(top1 * count), count)
    return 100 * top1, 100 * low, 100 * high


def _front(x: _Floats, y: _Floats) -> npt.NDArray[np.int64]:
    """Those that no other beats in one direction and at least equals in the other, from left to right."""
    equals = (x[:, None] <= x) & (y[:, None] <= y)
    beaten: npt.NDArray[np.bool_] = np.any(equals & ~equals.T, axis=1)
    order = np.argsort(x, kind="stable")
    return order[~beaten[order]]


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
    """Text before the number at its end."""


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
        axes.set_ylim(len(labels) - 0.45, -0.55)
    names = ["\n".join(textwrap.wrap(label, _LABEL)) for label in labels]
    facts = [_facts(model_info(comparison, label), findings.value(label, TOP1)) for label in labels]
    moderate.set_yticks(range(len(labels)), names, fontsize=SMALL)
    speed.set_yticks(range(len(labels)), [one + more for one, more in zip(names, facts, strict=True)], fontsize=SMALL)
    figure.suptitle("Throughput, memory and latency side by side", x=0.01, ha="left", fontsize=12, fontweight="bold")
    small_print(figure, _caption(comparison, labels))
    return figure


def _facts(info: dict[str, Any], top1: float | None) -> str:
    """The facts, in a line of their own if there are any."""
    tokens = tokens_text(info)
    facts = [f"K/V {tokens}" if tokens else "", "" if top1 is None else f"top-1 {top1:.1f}%"]
    return "\n" * any(facts) + ", ".join(filter(None, facts))


def _bars(axes: Axes, bars: list[_Bar], height: float, *, room: float = 1.2) -> None:
    """An infinite bar or whisker passes through the edge of the plot; a bar says so."""
    ends = [end for bar in bars if bar.row for end in (bar.row.value, bar.row.largest) if end is not None]
    edge = max((end for end in ends if math.isfinite(end)), default=1.0) or 1.0
    style: dict[str, Any] = {"textcoords": "offset points", "xytext": (4, 0), "va": "center", "fontsize": SMALL}
    for place, row, colour, opacity, before in bars:
        if row is None or row.value is None:
            text = " unknown" if row is None or row.metric.rank is None else " too few samples"
            axes.text(0, place, text, va="center", fontsize=SMALL, color=FAINT)
        elif math.isinf(row.value):
            axes.barh(place, edge * 2, height=height, color=colour, alpha=opacity, hatch="///", edgecolor="white")
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.annotate("∞: requests not answered", (0, place), bbox=box, **style)
        else:
            whisker = row.ends[0], min(row.ends[1], edge * 2)
            axes.barh(place, row.value, height=height, color=colour, alpha=opacity)
            axes.plot(whisker, (place, place), color=INK, linewidth=1, marker="|")
            axes.annotate(before + number(row.value), (min(whisker[1], edge), place), **style)
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
