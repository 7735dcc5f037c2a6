"""What all plots of a comparison share: the look of an arm, the typeface, the legend, and standalone SVG."""

import io
import itertools
import re
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.experiment.model import Plan

INK, FAINT, PALE = "#1d2430", "#66707f", "#dfe3e8"
_BASELINE, _REPEATED = "#555b66", "#a3a9b3"
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
"""Okabe and Ito, "Color Universal Design" (2008): colour-blind readers can tell them apart. Without their yellow, which
does not show on white."""
_MARKERS = "sD^vPo"
WIDTH = 8.3
"""Inches; 800 px in a browser."""
SMALL, SMALLER = 8.0, 7.5
"""Font sizes in points."""

STYLE = Path(__file__).with_name("plots.mplstyle")


class Style(NamedTuple):
    """The look of one arm in every plot."""

    name: str
    """For legends."""
    colour: str
    marker: str
    dash: str


def styles(plan: Plan) -> dict[str, Style]:
    """By label; the baseline is dark grey, the A/A arm light grey."""
    baseline, *others = plan.arms
    found = {baseline.label: Style(f"{baseline.label} (baseline)", _BASELINE, "o", "-")}
    found |= {arm.label: Style(f"{arm.label} (A/A)", _REPEATED, "x", ":") for arm in others if arm.repeat_of}
    compared = [arm.label for arm in others if not arm.repeat_of]
    looks = itertools.product(("-", "--", "-."), zip(_COLOURS, _MARKERS, strict=True))
    for label, (dash, (colour, marker)) in zip(compared, itertools.cycle(looks), strict=False):
        found[label] = Style(label, colour, marker, dash)
    return {arm.label: found[arm.label] for arm in plan.arms}


def instead(axes: Axes, text: str) -> None:
    """Text in place of a plot that has nothing to show."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=FAINT, transform=axes.transAxes)


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for the whole figure, with what `axes` shows, in as many columns as there is room for."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        # About 125 characters fit, of which the line before a name takes 7.
        columns = max(1, 125 // (7 + max(map(len, names))))
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), columns))


def small_print(figure: Figure, text: str) -> None:
    """Write text below the whole figure."""
    figure.supxlabel(text, x=0.01, ha="left", fontsize=SMALLER, color=FAINT)


def as_svg(figure: Figure, name: str) -> str:
    """The figure as SVG, from `<svg` on; ids begin with `name`, so that one page can hold several plots."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    return re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
