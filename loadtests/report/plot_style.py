"""What all plots of a comparison share: an arm's colour and marker, the typeface, and how a figure becomes SVG."""

import io
import re
import textwrap
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.experiment.model import Arm, Plan

INK, FAINT = "#1d2430", "#66707f"
_BASELINE, _TWIN = "#555b66", "#a3a9b3"
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
"""Okabe and Ito, "Color Universal Design" (2008): told apart by colour-blind readers too. Their yellow is left out: it
does not show on white."""
_MARKERS = "osD^vP"
WIDTH = 8.3
"""Inches; 800 px in a browser."""

RC: Any = {
    # Text stays text, so that a page can be searched and read aloud; paths would double its size.
    "svg.fonttype": "none",
    # The same figures give the same bytes.
    "svg.hashsalt": "stridevit",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    # A label with dollar signs is no formula.
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#dfe3e8",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """How one arm looks in every plot."""

    colour: str
    marker: str
    dash: str


def styles(plan: Plan) -> dict[str, Style]:
    """By label; the baseline is dark grey, the A/A arm light grey."""
    result: dict[str, Style] = {}
    place = 0
    for arm in plan.arms:
        if arm is plan.arms[0]:
            result[arm.label] = Style(colour=_BASELINE, marker="o", dash="-")
        elif arm.repeat_of is not None:
            result[arm.label] = Style(colour=_TWIN, marker="x", dash=":")
        else:
            turn = place // len(_COLOURS)
            result[arm.label] = Style(
                colour=_COLOURS[place % len(_COLOURS)],
                marker=_MARKERS[(place + 1) % len(_MARKERS)],
                dash=("-", "--", "-.")[turn % 3],
            )
            place += 1
    return result


def wrapped(label: str, width: int = 24) -> str:
    """A long label in several lines, broken at its hyphens."""
    return "\n".join(textwrap.wrap(label, width)) or label


def name_of(arm: Arm, plan: Plan) -> str:
    """For legends."""
    return f"{arm.label} (baseline)" if arm is plan.arms[0] else f"{arm.label} (A/A)" if arm.repeat_of else arm.label


def say(axes: Axes, text: str) -> None:
    """Instead of a plot that has nothing to show."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=FAINT, transform=axes.transAxes)


def as_svg(figure: Figure, name: str) -> str:
    """From `<svg` on; ids begin with `name`, so that several drawings can stand in one page."""
    buffer = io.StringIO()
    with mpl.rc_context(RC):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    return re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
