"""What `stridevit loadtest overload` found: a table of steps, a page, and a plot over time."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from loadtests.overload.measure import OverloadExperiment, requests, step_results
from loadtests.report.document import conditions, write_experiment
from loadtests.report.rendering import print_tables, tables


def write(experiment: OverloadExperiment, out: Path) -> Path:
    """Write report.md, results.json and overload.svg in `out`, print the table, and return the report's path."""
    plan, steps = experiment.plan, step_results(experiment)
    arrivals = ", ".join(f"{rate:g}/s for {seconds:g} s" for rate, seconds in plan.steps)
    what = conditions(experiment, f"Arrivals {arrivals}, a deadline of {plan.deadline_ms:g} ms")
    found = tables("overload_tables.txt.j2", title=what, steps=steps)
    write_experiment(
        experiment, out, template="overload.md.j2", figures={"steps": steps}, conditions=what, tables=found
    )
    _plot(experiment, out / "overload.svg")
    print_tables(*found, width=150)
    return out / "report.md"


def _plot(experiment: OverloadExperiment, path: Path) -> None:
    """Arrivals, answers in time, and their mean top-1 by second, in the first round that was measured."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    edges = np.arange(int(experiment.plan.seconds) + 1)
    middles = edges[:-1] + 0.5
    first = [blocks[0] for arm in experiment.plan.arms if (blocks := experiment.blocks_of(arm.label))]
    for block in first:
        every, top1 = requests([block], experiment.plan.deadline_ms), block.info["top1"]
        good = every[every.outcome == "in time"]
        counts, _ = np.histogram(good.due_s, bins=edges)
        percent = [top1.get(model, math.nan) * 100 for model in good.model.tolist()]
        sums, _ = np.histogram(good.due_s, bins=edges, weights=percent)
        above.plot(middles, counts, label=f"{block.arm}: in time")
        below.plot(middles, sums / np.where(counts, counts, math.nan), label=block.arm)
    if first:
        above.plot(middles, np.histogram(every.due_s, bins=edges)[0], color="grey", linestyle=":", label="arrivals")
    above.set(ylabel="requests per second", ylim=(0, None))
    below.set(ylabel="mean top-1, %", xlabel="seconds")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        if first:
            axes.legend()
    figure.savefig(path)
