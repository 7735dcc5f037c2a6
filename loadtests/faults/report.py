"""What `stridevit loadtest faults` found: a table of faults, what happened in words, and a plot of each over time."""

import math
from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from loadtests.faults.figures import RECOVERED_FACTOR, RECOVERED_SECONDS
from loadtests.faults.plan import FaultExperiment, FaultResult
from loadtests.report.document import conditions, write_experiment
from loadtests.report.plot_style import FAINT, INK, PALE, SMALLER, STYLE, WIDTH, instead
from loadtests.report.rendering import print_tables, tables

_COLUMNS = 3
_ROW_INCHES = 1.25
_REFUSED, _OTHERS = "#e69f00", "#d55e00"


def write(experiment: FaultExperiment, out: Path) -> Path:
    """Write report.md, results.json and faults.svg in `out`, print the table, and return the report's path."""
    plan, results = experiment.plan, experiment.results
    tried = [result for result in results if result.not_run is None]
    not_run = [*plan.not_run, *((result.fault, result.not_run) for result in results if result.not_run)]
    load = f"{plan.rate:g} requests a second, {plan.seconds:g} s before and after each fault"
    what = conditions(experiment, f"{len(tried)} faults; {load}")
    found = tables("faults_tables.txt.j2", results=tried, title=what)
    write_experiment(
        experiment,
        out,
        template="faults.md.j2",
        figures={"broken": experiment.broken, "not_run": not_run},
        conditions=what,
        tables=found,
        results=tried,
        broken=experiment.broken,
        not_run=[f"{name}: {reason}" for name, reason in not_run],
        factor=RECOVERED_FACTOR,
        window=RECOVERED_SECONDS,
    )
    if tried:
        with style.context(STYLE):
            _plot(tried).savefig(out / "faults.svg", metadata={"Date": None})
    print_tables(*found, width=200)
    return out / "report.md"


def _plot(results: list[FaultResult]) -> Figure:
    """The slowest answer of each half second, and below it the half seconds in which something was not answered."""
    rows = math.ceil(len(results) / _COLUMNS)
    figure = Figure(figsize=(WIDTH, 0.6 + _ROW_INCHES * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False, sharey=True)
    for axes, result in zip(panels.flat, results, strict=False):
        _panel(axes, result)
    for axes in panels.flat[len(results) :]:
        axes.set_axis_off()
    figure.supxlabel("seconds after the fault began (shaded: the fault)", fontsize=SMALLER, color=FAINT)
    figure.supylabel("slowest answer, ms", fontsize=SMALLER, color=FAINT)
    handles, names = next((found for axes in panels.flat if (found := axes.get_legend_handles_labels())[0]), ([], []))
    figure.legend(handles, names, loc="outside upper left", ncols=3, fontsize=SMALLER)
    return figure


def _panel(axes: Axes, result: FaultResult) -> None:
    bins = result.timeline
    axes.set_title(result.fault, fontsize=SMALLER, loc="left", pad=2)
    if not bins:
        instead(axes, "it did not start")
        return
    times = [each.at_s + 0.25 for each in bins]
    axes.axvspan(0, result.lasted_s, color=PALE)
    axes.plot(times, [each.worst_ms or math.nan for each in bins], color=INK, linewidth=0.9, label="slowest answer")
    for name, colour, height in (("refused", _REFUSED, 0.6), ("others", _OTHERS, 1.0)):
        marked = [time for time, each in zip(times, bins, strict=True) if getattr(each, name)]
        label = "some refused" if name == "refused" else "some failed or lost"
        axes.plot(marked, [height] * len(marked), "|", color=colour, markersize=5, label=label)
    axes.set_yscale("log")
    axes.set_ylim(0.4, 30_000)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=6)
