"""Pictures of the raw measurements: the latency spectrum, and every block in the order in which it ran."""

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from loadtests.experiment.model import HIGH, MODERATE, SATURATED, Comparison
from loadtests.report.figures import load_name, median
from loadtests.report.plot_style import FAINT, INK, WIDTH, name_of, say, styles
from loadtests.statistics import percentile

_RANKS = (50.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.99)


def latency(comparison: Comparison) -> Figure:
    """Percentiles of both open loops on an axis that gives every nine the same room, as HdrHistogram's plots do.

    All blocks' requests are pooled. Where requests failed, the curve leaves the plot at their share.
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    pooled = {load: _pooled(comparison, load) for load in (MODERATE, HIGH)}
    finite = [values[np.isfinite(values)] for by_arm in pooled.values() for values in by_arm.values()]
    every = np.concatenate([np.zeros(0), *finite])
    # Half of the requests were faster than where the curves begin.
    lowest = min((float(np.percentile(values, 50)) for values in finite if len(values)), default=1.0)
    for axes, (load, by_arm) in zip(panels, pooled.items(), strict=True):
        if not len(every) or not by_arm:
            say(axes, f"no answers at {load_name(comparison, load)}")
            continue
        _spectrum(axes, comparison, by_arm, top=float(every.max()) * 1.4)
        axes.set_ylim(lowest / 1.4, float(every.max()) * 1.4)
        axes.set_title(f"At {load_name(comparison, load)}")
    panels[0].set_ylabel("latency from the scheduled moment, ms (log)")
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3))
    return figure


def _pooled(comparison: Comparison, load: str) -> dict[str, npt.NDArray[np.float64]]:
    pooled = {}
    for arm in comparison.plan.arms:
        values = [block.loads[load].latencies_ms for block in comparison.blocks_of(arm.label) if load in block.loads]
        if sum(map(len, values)):
            pooled[arm.label] = np.sort(np.concatenate(values))
    return pooled


def _spectrum(axes: Axes, comparison: Comparison, by_arm: dict[str, npt.NDArray[np.float64]], *, top: float) -> None:
    plan, looks = comparison.plan, styles(comparison.plan)
    last = 50.0
    failed = []
    for arm in plan.arms:
        values = by_arm.get(arm.label)
        if values is None:
            continue
        shown = [rank for rank in _RANKS if percentile(values, rank) is not None]
        last = max([last, *shown])
        # From the middle on; the last five samples say nothing that could be relied on.
        places = np.arange(len(values) // 2, max(len(values) - 5, 0))
        if not len(places):
            continue
        heights = np.where(np.isfinite(values[places]), values[places], top * 1e3)
        look = looks[arm.label]
        axes.plot(
            1 / (1 - places / len(values)),
            heights,
            color=look.colour,
            linestyle=look.dash,
            linewidth=1.8,
            label=name_of(arm, plan),
        )
        share = float(np.isinf(values).mean())
        if share:
            failed.append(f"{arm.label}: {share:.2%} not answered ↑")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [rank for rank in _RANKS if rank <= last]
    axes.set_xlim(2, 1 / (1 - last / 100) * 1.25)
    axes.set_xticks([1 / (1 - rank / 100) for rank in ticks], [f"{rank:g}" for rank in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
    axes.set_xlabel("percentile of the requests")
    axes.grid(visible=True, which="both")
    axes.axhline(plan.objective_ms, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    if plan.objective_ms < top:
        text = f"objective: p{plan.objective_percentile:g} ≤ {plan.objective_ms:g} ms"
        axes.annotate(text, (2, plan.objective_ms), xytext=(4, 3), textcoords="offset points", fontsize=7.5, color=INK)
    if failed:
        axes.text(
            0.02, 0.97, "\n".join(failed), transform=axes.transAxes, va="top", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": FAINT, "linewidth": 0.6, "pad": 3},
        )  # fmt: skip


def blocks(comparison: Comparison) -> Figure:
    """Saturated throughput of every block in the order run, and each round's ratio to the baseline."""
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1)
    _in_order(above, comparison)
    _ratios(below, comparison)
    handles, names = above.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4))
    return figure


def _in_order(axes: Axes, comparison: Comparison) -> None:
    plan, looks = comparison.plan, styles(comparison.plan)
    places: dict[str, list[tuple[int, float]]] = {arm.label: [] for arm in plan.arms}
    failed = []
    for place, block in enumerate(comparison.blocks, start=1):
        if block.arm not in places:
            continue
        if block.failure is not None or SATURATED not in block.loads:
            failed.append((place, looks[block.arm].colour))
        else:
            places[block.arm].append((place, block.loads[SATURATED].throughput))
    if not any(places.values()):
        say(axes, "no block was measured to its end")
        return
    for arm in plan.arms:
        if not places[arm.label]:
            continue
        look = looks[arm.label]
        at, heights = zip(*places[arm.label], strict=True)
        axes.plot(at, heights, color=look.colour, linewidth=0.8, alpha=0.6)
        axes.plot(
            at, heights, color=look.colour, marker=look.marker, linestyle="", markersize=5, label=name_of(arm, plan)
        )
    begins = [
        place + 0.5
        for place, (before, after) in enumerate(zip(comparison.blocks, comparison.blocks[1:], strict=False), start=1)
        if before.round != after.round
    ]
    low, high = axes.get_ylim()
    axes.set_ylim(low - (high - low) * 0.08, high)
    axes.vlines(begins, 0, 1, transform=axes.get_xaxis_transform(), color="#dfe3e8", linewidth=0.8, zorder=0)
    for place, colour in failed:
        axes.annotate(
            "✗ failed", (place, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8, color=colour
        )
    axes.set_xlim(0.3, len(comparison.blocks) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Throughput at saturation of every block; the axis does not begin at 0")
    axes.set_xlabel("blocks in the order run (lines between them: a new round begins)")
    axes.set_ylabel("images/s")
    axes.grid(visible=True, axis="y")


def _ratios(axes: Axes, comparison: Comparison) -> None:
    plan, looks = comparison.plan, styles(comparison.plan)
    base = _by_round(comparison, plan.arms[0].label)
    axes.axhline(1, color=looks[plan.arms[0].label].colour, linewidth=1.4)
    shown = False
    for arm in plan.arms[1:]:
        own = _by_round(comparison, arm.label)
        shared = sorted(number for number in own if base.get(number))
        if not shared:
            continue
        shown = True
        look = looks[arm.label]
        ratios = [own[number] / base[number] for number in shared]
        axes.plot(
            [number + 1 for number in shared], ratios, color=look.colour, marker=look.marker, markersize=5,
            linewidth=0.8, linestyle=look.dash,
        )  # fmt: skip
        axes.axhline(median(ratios) or 1, color=look.colour, linewidth=0.8, linestyle=(0, (6, 4)), alpha=0.7)
    if not shown:
        say(axes, "no round has a block of the baseline and of another arm")
        return
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("The same, as a ratio to the baseline's block of the same round (dashed: median)")
    axes.set_xlabel("round")
    axes.set_ylabel("× baseline")
    axes.grid(visible=True, axis="y")


def _by_round(comparison: Comparison, label: str) -> dict[int, float]:
    return {
        block.round: block.loads[SATURATED].throughput
        for block in comparison.blocks_of(label)
        if SATURATED in block.loads
    }
