"""The picture to choose by: accuracy against throughput, memory as area; without accuracies, memory by throughput."""

import math
from dataclasses import dataclass

from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.experiment.model import Comparison
from loadtests.report.format import load_name, number
from loadtests.report.plot_style import FAINT, INK, SMALL, WIDTH, Style, instead, shown, small_print, styles
from loadtests.report.verdicts import LATENCIES, MEMORY, THROUGHPUT, TOP1, Findings, Row, model_info
from loadtests.statistics import wilson

_LARGEST = 900.0
"""Square points of the largest marker."""
_PLAIN = 120.0
"""Square points of a marker where there is nothing to be shown by area."""


@dataclass(frozen=True, kw_only=True)
class _Point:
    style: Style
    x: float
    x_ends: tuple[float, float]
    y: float
    y_ends: tuple[float, float]
    area: float
    """0 if it is unknown."""


@dataclass(frozen=True, kw_only=True)
class _Area:
    """What the area of a marker stands for."""

    title: str
    unit: str
    before: str
    """Before the number, in a label."""


def pareto(comparison: Comparison, findings: Findings) -> Figure:
    """One point for each arm but the A/A arm; those that no other beats in both directions are joined."""
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    axes = figure.subplots()
    labels = [arm.label for arm in shown(comparison.plan) if findings.value(arm.label, THROUGHPUT) is not None]
    accurate = [label for label in labels if findings.value(label, TOP1) is not None]
    heavy = [label for label in labels if findings.value(label, MEMORY)]
    whiskers = "Whiskers: slowest and fastest block"
    if len(accurate) > 1 or (accurate and len(labels) == 1):
        points = [_by_accuracy(comparison, findings, label) for label in accurate]
        area = _Area(title="Area: peak memory", unit="MB", before="peak ")
        left_out = ", ".join(label for label in labels if label not in accurate)
        missing = f"; without accuracy, so not shown: {left_out}" if left_out else ""
        axes.set_title(f"Accuracy against throughput: up and to the right is better{missing}")
        axes.set_ylabel("top-1, %")
        whiskers += "; upwards, 95 % interval of top-1 for that many test images"
    elif heavy:
        points, area = _by_memory(comparison, findings, heavy)
        axes.set_title("Memory against throughput (accuracy unknown: random weights): down and to the right is better")
        axes.set_ylabel("peak memory, MB")
    else:
        instead(axes, "Neither accuracy nor memory is known: nothing to weigh throughput against.")
        return figure
    axes.set_xlabel("throughput at saturation, images/s")
    small_print(figure, f"{whiskers}. Dashed: not beaten in both directions.")
    axes.grid(visible=True)
    _draw(figure, axes, points, area, up_is_better=bool(accurate))
    return figure


def _by_accuracy(comparison: Comparison, findings: Findings, label: str) -> _Point:
    accuracy = model_info(comparison, label)["accuracy"]
    ends = wilson(round(accuracy["top1"] * accuracy["n"]), accuracy["n"])
    return _point(
        comparison,
        findings,
        label,
        y=100 * accuracy["top1"],
        y_ends=(100 * ends[0], 100 * ends[1]),
        area=(findings.value(label, MEMORY) or 0.0) / 1e6,
    )


def _by_memory(comparison: Comparison, findings: Findings, labels: list[str]) -> tuple[list[_Point], _Area]:
    p99 = [metric for metric in reversed(LATENCIES) if metric.rank == 99]
    shared = [
        metric for metric in p99 if all(math.isfinite(findings.value(label, metric) or math.inf) for label in labels)
    ]
    points = []
    for label in labels:
        peak, smallest, largest = (end / 1e6 for end in _ends(findings.row(label, MEMORY)))
        area = findings.value(label, shared[0]) if shared else None
        points.append(_point(comparison, findings, label, y=peak, y_ends=(smallest, largest), area=area or 0.0))
    title = f"Area: p99 at {load_name(comparison, shared[0].load or '')}" if shared else ""
    return points, _Area(title=title, unit="ms", before="p99 ")


def _point(
    comparison: Comparison, findings: Findings, label: str, *, y: float, y_ends: tuple[float, float], area: float
) -> _Point:
    x, *x_ends = _ends(findings.row(label, THROUGHPUT))
    style = styles(comparison.plan)[label]
    return _Point(style=style, x=x, x_ends=(x_ends[0], x_ends[1]), y=y, y_ends=y_ends, area=area)


def _ends(row: Row | None) -> tuple[float, float, float]:
    """The value, and the smallest and the largest block."""
    value = row.value if row and row.value is not None else 0.0
    ends = (row.smallest, row.largest) if row else (None, None)
    return value, value if ends[0] is None else ends[0], value if ends[1] is None else ends[1]


def _draw(figure: Figure, axes: Axes, points: list[_Point], area: _Area, *, up_is_better: bool) -> None:
    largest = max(point.area for point in points)
    front = _front(points, up_is_better=up_is_better)
    axes.plot([one.x for one in front], [one.y for one in front], color=FAINT, linewidth=1, linestyle="--", zorder=1)
    colours, sizes = (
        [one.style.colour for one in points],
        [_LARGEST * one.area / largest if largest else _PLAIN for one in points],
    )
    x, y = [one.x for one in points], [one.y for one in points]
    axes.hlines(y, *zip(*(one.x_ends for one in points), strict=True), color=colours, linewidth=1.2, zorder=2)
    axes.vlines(x, *zip(*(one.y_ends for one in points), strict=True), color=colours, linewidth=1.2, zorder=2)
    markers = axes.scatter(x, y, s=sizes, color=colours, alpha=0.55, zorder=3)
    axes.scatter(x, y, s=5, color=INK, zorder=4)
    axes.margins(0.12, 0.2)
    if largest:
        _area_key(axes, area, largest)
    labels = []
    for one in points:
        text = one.style.name + (f"\n{area.before}{number(one.area)} {area.unit}" if one.area else "")
        box = {"facecolor": "white", "edgecolor": one.style.colour, "linewidth": 0.8, "alpha": 0.85, "pad": 2}
        labels.append(axes.text(one.x, one.y, text, fontsize=SMALL, bbox=box, zorder=5))
    # Where things lie is known only after the layout. A limit of steps, not of time, gives the same picture each time.
    figure.draw_without_rendering()
    line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.8}
    adjust_text(labels, objects=markers, ax=axes, expand=(1.1, 1.3), iter_lim=300, arrowprops=line)


def _front(points: list[_Point], *, up_is_better: bool) -> list[_Point]:
    """Those that no other equals or beats in both directions, from left to right."""

    def beats(one: _Point, other: _Point) -> bool:
        higher = one.y >= other.y if up_is_better else one.y <= other.y
        return one.x >= other.x and higher and (one.x, one.y) != (other.x, other.y)

    return sorted((one for one in points if not any(beats(other, one) for other in points)), key=lambda one: one.x)


def _area_key(axes: Axes, area: _Area, largest: float) -> None:
    power = 10 ** math.floor(math.log10(largest))
    most = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= largest)
    values = (most / 4, most / 2, most)
    handles = [axes.scatter([], [], s=_LARGEST * value / largest, color="#fff", edgecolors=FAINT) for value in values]
    room = {"labelspacing": 2.6, "borderpad": 1.4, "handletextpad": 1.4}
    names = [f"{number(value)} {area.unit}" for value in values]
    axes.legend(handles, names, title=area.title, loc="center left", bbox_to_anchor=(1.01, 0.5), **room)
