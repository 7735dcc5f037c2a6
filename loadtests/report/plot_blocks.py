"""Pictures of the raw measurements: the latency spectrum, and every block in the order in which it ran."""

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from loadtests.experiment.model import HIGH, MODERATE, SATURATED, Comparison
from loadtests.report.findings import THROUGHPUT
from loadtests.report.plot_style import FAINT, INK, PALE, SMALL, SMALLER, WIDTH, instead, legend_below, styles
from loadtests.report.rendering import median
from loadtests.report.verdicts import load_name, loads_of, ratio, values_by_round
from loadtests.statistics import MIN_BEYOND, percentile

_RANKS = (50.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.99)

_Latencies = dict[str, npt.NDArray[np.float64]]
"""By label, ascending, in ms."""


def latency(comparison: Comparison) -> Figure:
    """Percentiles of both open loops on an axis that gives every nine the same room, as HdrHistogram's plots do.

    All blocks' requests are pooled. Where requests failed, the curve leaves the plot at their share.
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    pooled: dict[str, _Latencies] = {MODERATE: {}, HIGH: {}}
    for (label, name), loads in loads_of(comparison).items():
        latencies = np.sort(np.concatenate([load.latencies_ms for load in loads]))
        if name in pooled and len(latencies):
            pooled[name][label] = latencies
    finite = [one[np.isfinite(one)] for by_arm in pooled.values() for one in by_arm.values()]
    # Half of the requests were faster than where the curves begin.
    lowest = min((float(np.median(one)) for one in finite if len(one)), default=1.0) / 1.4
    highest = max((float(one[-1]) for one in finite if len(one)), default=0.0) * 1.4
    for axes, (load, by_arm) in zip(panels, pooled.items(), strict=True):
        if not highest or not by_arm:
            instead(axes, f"no answers at {load_name(comparison, load)}")
            continue
        _spectrum(axes, comparison, by_arm, highest)
        axes.set(ylim=(lowest, highest), title=f"At {load_name(comparison, load)}")
    panels[0].set_ylabel("latency from the scheduled moment, ms (log)")
    legend_below(figure, panels[0])
    return figure


def _spectrum(axes: Axes, comparison: Comparison, by_arm: _Latencies, highest: float) -> None:
    plan, last, failed = comparison.plan, 50.0, []
    for label, style in styles(plan).items():
        latencies = by_arm.get(label, np.empty(0))
        last = max([last, *(rank for rank in _RANKS if percentile(latencies, rank) is not None)])
        # From the middle on, without the last samples, which are not reliable.
        places = np.arange(len(latencies) // 2, len(latencies) - MIN_BEYOND)
        if not len(places):
            continue
        heights = np.where(np.isfinite(latencies[places]), latencies[places], highest * 1e3)
        x = 1 / (1 - places / len(latencies))
        axes.plot(x, heights, color=style.colour, linestyle=style.dash, linewidth=1.8, label=style.name)
        if share := float(np.isinf(latencies).mean()):
            failed.append(f"{label}: {share:.2%} not answered ↑")
    axes.set(xscale="log", yscale="log", xlabel="percentile of the requests")
    ticks = [rank for rank in _RANKS if rank <= last]
    axes.set_xlim(2, 1 / (1 - last / 100) * 1.25)
    axes.set_xticks([1 / (1 - rank / 100) for rank in ticks], [f"{rank:g}" for rank in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
    axes.grid(visible=True, which="both")
    axes.axhline(plan.objective_ms, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    if plan.objective_ms < highest:
        text = f"objective: p{plan.objective_percentile:g} ≤ {plan.objective_ms:g} ms"
        axes.annotate(text, (2, plan.objective_ms), xytext=(4, 3), textcoords="offset points", fontsize=SMALLER)
    if failed:
        box = {"facecolor": "white", "edgecolor": FAINT, "linewidth": 0.6, "pad": 3}
        axes.text(0.02, 0.97, "\n".join(failed), transform=axes.transAxes, va="top", fontsize=SMALL, bbox=box)


def blocks(comparison: Comparison) -> Figure:
    """Saturated throughput of every block in the order run, and each round's ratio to the baseline."""
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1)
    above.set(title="Throughput at saturation of every block; the axis does not begin at 0", ylabel="images/s")
    above.set(xlabel="blocks in the order run (lines between them: a new round begins)")
    below.set(title="The same, as a ratio to the baseline's block of the same round (dashed: median)")
    below.set(xlabel="round", ylabel="× baseline")
    for axes in (above, below):
        axes.grid(visible=True, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _in_order(above, comparison)
    _ratios(below, comparison)
    legend_below(figure, above)
    return figure


def _in_order(axes: Axes, comparison: Comparison) -> None:
    placed = list(enumerate(comparison.blocks, start=1))
    measured = [(at, block) for at, block in placed if block.failure is None and SATURATED in block.loads]
    if not measured:
        instead(axes, "no block was measured to its end")
        return
    looks = styles(comparison.plan)
    for label, look in looks.items():
        if own := [(at, block.loads[SATURATED].throughput) for at, block in measured if block.arm == label]:
            axes.plot(*zip(*own, strict=True), color=look.colour, linewidth=0.8, alpha=0.6)
            axes.plot(*zip(*own, strict=True), look.marker, color=look.colour, markersize=5, label=look.name)
    axes.margins(y=0.12)
    along = axes.get_xaxis_transform()
    for at, block in placed:
        if block.round != comparison.blocks[at - 2].round and at > 1:
            axes.axvline(at - 0.5, color=PALE, linewidth=0.8, zorder=0)
        if block.failure is not None:
            colour = looks[block.arm].colour
            axes.text(at, 0.02, "✗ failed", transform=along, ha="center", fontsize=SMALL, color=colour)
    axes.set_xlim(0.3, len(placed) + 0.7)


def _ratios(axes: Axes, comparison: Comparison) -> None:
    looks = styles(comparison.plan)
    throughput = {label: values_by_round(comparison.blocks_of(label), THROUGHPUT) for label in looks}
    (baseline, base), *others = throughput.items()
    ratios = {label: ratio(own, base) for label, own in others}
    if not any(ratios.values()):
        instead(axes, "no round has a block of the baseline and of another arm")
        return
    axes.axhline(1, color=looks[baseline].colour, linewidth=1.4)
    for label, own in ratios.items():
        look, x, line = looks[label], [number + 1 for number in own], f"{looks[label].marker}{looks[label].dash}"
        axes.plot(x, list(own.values()), line, color=look.colour, markersize=5, linewidth=0.8)
        axes.axhline(median(own.values()) or 1, color=look.colour, linewidth=0.8, linestyle=(0, (6, 4)), alpha=0.7)
