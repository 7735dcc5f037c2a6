"""The picture to choose by: accuracy against throughput, memory as area; without accuracies, memory by throughput."""

import math
from typing import Any, NamedTuple

import numpy as np
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.experiment.model import Comparison
from loadtests.experiment.schedule import without_repeats
from loadtests.report.format import number
from loadtests.report.plot_style import FAINT, INK, SMALL, WIDTH, Style, instead, small_print, styles
from loadtests.report.verdicts import THROUGHPUT, TOP1, Findings, model_info
from loadtests.statistics import wilson

_LARGEST = 900.0
"""Square points of the largest marker."""
_PLAIN = 120.0
"""Square points of a marker where there is nothing to be shown by area."""

_Ends = tuple[float, float, float]
"""A value and both ends of its whisker."""


class _Point(NamedTuple):
    style: Style
    x: _Ends
    y: _Ends
    area: float
    """0 if it is unknown."""


def pareto(comparison: Comparison, findings: Findings) -> Figure:
    """One point for each arm but the A/A arm; those that no other beats in both directions are joined."""
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    axes, looks = figure.subplots(), styles(comparison.plan)
    rows = [findings.row(arm.label, THROUGHPUT) for arm in without_repeats(comparison.plan)]
    speeds = {row.arm: (row.value, *row.ends) for row in rows if row and row.value is not None}
    known = [row for label in speeds if (row := findings.row(label, findings.memory)) and row.value]
    memory = {row.arm: (row.value or 0.0, *row.ends) for row in known}
    accurate = [label for label in speeds if findings.value(label, TOP1) is not None]
    whiskers = "Whiskers: slowest and fastest block"
    if len(accurate) > 1 or (accurate and len(speeds) == 1):
        points = [
            _Point(looks[label], speeds[label], _top1(model_info(comparison, label)), memory.get(label, (0.0,))[0])
            for label in accurate
        ]
        area, unit = findings.memory.label, "MB"
        left_out = ", ".join(label for label in speeds if label not in accurate)
        missing = f"; without accuracy, so not shown: {left_out}" if left_out else ""
        axes.set(title=f"Accuracy against throughput: up and to the right is better{missing}", ylabel=TOP1.heading)
        whiskers += "; upwards, 95 % interval of top-1 for that many test images"
    elif memory:
        tails = [metric for metric in reversed(findings.metrics) if metric.rank == 99]
        finite = [tail for tail in tails if all(math.isfinite(findings.value(one, tail) or math.inf) for one in memory)]
        area, unit = finite[0].label if finite else "", "ms"
        points = [
            _Point(looks[label], speeds[label], ends, (findings.value(label, finite[0]) or 0.0) if finite else 0.0)
            for label, ends in memory.items()
        ]
        title = "Memory against throughput (accuracy unknown: random weights): down and to the right is better"
        axes.set(title=title, ylabel=findings.memory.heading)
    else:
        instead(axes, "Neither accuracy nor memory is known: nothing to weigh throughput against.")
        return figure
    axes.set_xlabel("throughput at saturation, images/s")
    axes.grid(visible=True)
    small_print(figure, f"{whiskers}. Dashed: not beaten in both directions.")
    _draw(figure, axes, points, area, unit, up_is_better=bool(accurate))
    return figure


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
