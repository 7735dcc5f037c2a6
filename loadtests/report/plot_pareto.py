"""The picture to choose by: accuracy against throughput, memory as area; without accuracies, memory by throughput."""

import itertools
import math
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from loadtests.accuracy.figures import wilson
from loadtests.experiment.model import Comparison
from loadtests.report.figures import info_of, load_name, number
from loadtests.report.plot_style import FAINT, INK, WIDTH, Style, say, styles
from loadtests.report.verdicts import Findings, Row

_MOST_AREA = 900.0
"""Square points of the largest marker."""
_PLAIN_AREA = 120.0
"""Where there is nothing to be shown by area."""


@dataclass(frozen=True, kw_only=True)
class _Point:
    name: str
    look: Style
    across: float
    across_ends: tuple[float, float]
    up: float
    up_ends: tuple[float, float]
    area: float
    """0 if not known."""


@dataclass(frozen=True, kw_only=True)
class _Area:
    """What the area of a marker stands for."""

    title: str
    unit: str
    before: str
    """Of the number, in a label."""


def pareto(comparison: Comparison, findings: Findings) -> Figure:
    """A point an arm, the A/A arm left out; those that no other beats in both directions are joined."""
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in findings.rows if row.arm.repeat_of is None and _value(row, "throughput") is not None]
    accurate = [row for row in rows if _value(row, "top1") is not None]
    heavy = [row for row in rows if _value(row, "peak_bytes")]
    whiskers = "Whiskers: slowest and fastest block"
    if len(accurate) > 1 or (accurate and len(rows) == 1):
        points, area = _by_accuracy(comparison, accurate)
        _draw(axes, points, area, up_is_better=True)
        left = ", ".join(row.arm.label for row in rows if row not in accurate)
        missing = f"; without accuracy, so not shown: {left}" if left else ""
        axes.set_title(f"Accuracy against throughput: up and to the right is better{missing}")
        axes.set_ylabel("top-1, %")
        whiskers += "; upwards, 95 % interval of top-1 on so many test images"
    elif heavy:
        points, area = _by_memory(comparison, heavy)
        _draw(axes, points, area, up_is_better=False)
        axes.set_title(
            "Memory against throughput (accuracy not known: random weights): down and to the right is better"
        )
        axes.set_ylabel("peak memory, MB")
    else:
        say(axes, "Neither accuracy nor memory is known: nothing to weigh throughput against.")
        return figure
    axes.set_xlabel("throughput at saturation, images/s")
    figure.supxlabel(
        f"{whiskers}. Dashed: not beaten in both directions.", x=0.01, ha="left", fontsize=7.5, color=FAINT
    )
    axes.grid(visible=True)
    _name(figure, axes, points, area)
    return figure


def _by_accuracy(comparison: Comparison, rows: list[Row]) -> tuple[list[_Point], _Area]:
    points = []
    for row in rows:
        top1 = _value(row, "top1") or 0.0
        images = _images(comparison, row)
        low, high = wilson(round(top1 * images), images) if images else (top1, top1)
        points.append(
            _point(comparison, row, up=top1 * 100, up_ends=(low * 100, high * 100), area=_value(row, "peak_bytes"))
        )
    area = _Area(title="Area: peak memory", unit="MB", before="peak ")
    return [replace(point, area=point.area / 1e6) for point in points], area


def _by_memory(comparison: Comparison, rows: list[Row]) -> tuple[list[_Point], _Area]:
    load = next((load for load in ("high", "moderate") if all(_finite(row, f"{load}_p99") for row in rows)), None)
    points = []
    for row in rows:
        figure = row.figures["peak_bytes"]
        peak = (figure.value or 0.0) / 1e6
        ends = (peak if end is None else end / 1e6 for end in (figure.smallest, figure.largest))
        points.append(
            _point(comparison, row, up=peak, up_ends=(next(ends), next(ends)), area=_value(row, f"{load}_p99"))
        )
    title = f"Area: p99 at {load_name(comparison, load)}" if load else ""
    return points, _Area(title=title, unit="ms", before="p99 ")


def _point(comparison: Comparison, row: Row, *, up: float, up_ends: tuple[float, float], area: float | None) -> _Point:
    figure, baseline = row.figures["throughput"], comparison.plan.arms[0].label
    across = figure.value or 0.0
    return _Point(
        name=row.arm.label + (" (baseline)" if row.arm.label == baseline else ""),
        look=styles(comparison.plan)[row.arm.label],
        across=across,
        across_ends=(
            across if figure.smallest is None else figure.smallest,
            across if figure.largest is None else figure.largest,
        ),
        up=up,
        up_ends=up_ends,
        area=area if area is not None and math.isfinite(area) else 0.0,
    )


def _draw(axes: Axes, points: list[_Point], area: _Area, *, up_is_better: bool) -> None:
    most = max(point.area for point in points)
    front = _front(points, up_is_better=up_is_better)
    axes.plot(
        [point.across for point in front],
        [point.up for point in front],
        color=FAINT,
        linewidth=1,
        linestyle="--",
        zorder=1,
    )
    for point in points:
        size = _size(point, most)
        axes.hlines(point.up, *point.across_ends, color=point.look.colour, linewidth=1.2, zorder=2)
        axes.vlines(point.across, *point.up_ends, color=point.look.colour, linewidth=1.2, zorder=2)
        axes.scatter(point.across, point.up, s=size, color=point.look.colour, alpha=0.55, zorder=3)
        axes.scatter(point.across, point.up, s=5, color=INK, zorder=4)
    axes.margins(0.08, 0.15)
    if most:
        _size_key(axes, area, most)


def _size(point: _Point, most: float) -> float:
    return _MOST_AREA * point.area / most if most else _PLAIN_AREA


def _name(figure: Figure, axes: Axes, points: list[_Point], area: _Area) -> None:
    """Label every point where its label covers least of the markers and of other labels, close by if it can."""
    # Where things lie is known only after the layout.
    figure.draw_without_rendering()
    most, pixels, taken = max(point.area for point in points), figure.dpi / 72, []
    for point in points:
        x, y = axes.transData.transform((point.across, point.up))
        reach = math.sqrt(_size(point, most)) / 2 * pixels
        (left, low), (right, high) = axes.transData.transform(list(zip(point.across_ends, point.up_ends, strict=True)))
        taken += [
            Bbox.from_extents(x - reach, y - reach, x + reach, y + reach),
            Bbox.from_extents(left, y - 2, right, y + 2),
            Bbox.from_extents(x - 2, low, x + 2, high),
        ]
    for point in points:
        label = axes.annotate(
            point.name + (f"\n{area.before}{number(point.area)} {area.unit}" if point.area else ""),
            (point.across, point.up),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": point.look.colour, "linewidth": 0.8, "alpha": 0.85, "pad": 2},
            zorder=5,
        )
        reach = math.sqrt(_size(point, most)) / 2 * 0.75 + 2
        choices = [
            (_covered(_put(label, right, up, reach * far), taken, axes) + far, right, up, reach * far)
            for far, up, right in itertools.product((1.0, 2.0, 3.0, 4.0), (1, -1), (1, -1))
        ]
        _, right, up, stands_off = min(choices)
        taken.append(_put(label, right, up, stands_off))
        if stands_off > reach:
            line = {"arrowstyle": "-", "color": point.look.colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 2}
            at = (right * stands_off, up * stands_off)
            axes.annotate(
                "", (point.across, point.up), xytext=at, textcoords="offset points", arrowprops=line, zorder=4
            )


def _put(label: Annotation, right: int, up: int, reach: float) -> Bbox:
    label.set(position=(right * reach, up * reach))
    label.set(ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top")
    return label.get_window_extent()


def _covered(box: Bbox, taken: list[Bbox], axes: Axes) -> float:
    """Square pixels of what lies below it, or beyond the plot."""
    below = (Bbox.intersection(box, other) for other in taken)
    inside = Bbox.intersection(box, axes.get_window_extent())
    whole = box.width * box.height
    out = whole - (inside.width * inside.height if inside else 0.0)
    return sum(part.width * part.height for part in below if part) + 10 * out


def _front(points: list[_Point], *, up_is_better: bool) -> list[_Point]:
    """Those that no other equals or beats in both directions, from left to right."""

    def beats(one: _Point, other: _Point) -> bool:
        higher = one.up >= other.up if up_is_better else one.up <= other.up
        return one.across >= other.across and higher and (one.across, one.up) != (other.across, other.up)

    return sorted(
        (point for point in points if not any(beats(other, point) for other in points)), key=lambda point: point.across
    )


def _size_key(axes: Axes, area: _Area, most: float) -> None:
    power = 10 ** math.floor(math.log10(most))
    largest = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= most)
    values = (largest / 4, largest / 2, largest)
    handles = [axes.scatter([], [], s=_MOST_AREA * value / most, color="#fff", edgecolors=FAINT) for value in values]
    names = [f"{number(value)} {area.unit}" for value in values]
    axes.legend(
        handles,
        names,
        title=area.title,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        labelspacing=2.6,
        borderpad=1.4,
        handletextpad=1.4,
    )


def _images(comparison: Comparison, row: Row) -> int:
    """How many images the manifest's accuracy is of; 0 if the row's accuracy is another."""
    accuracy = info_of(comparison, row.arm.label).get("accuracy") or {}
    same = math.isclose(accuracy.get("top1", -1.0), _value(row, "top1") or 0.0, abs_tol=1e-9)
    return int(accuracy.get("n", 0)) if same else 0


def _value(row: Row, key: str) -> float | None:
    figure = row.figures.get(key)
    return figure.value if figure else None


def _finite(row: Row, key: str) -> bool:
    value = _value(row, key)
    return value is not None and math.isfinite(value)
