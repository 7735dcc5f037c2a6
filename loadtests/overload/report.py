"""What `stridevit loadtest overload` found: tables of steps and of recovery, a page, and a plot over time."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from loadtests.overload.measure import (
    STEPS,
    OverloadExperiment,
    foretold,
    measured_arms,
    recoveries,
    requests,
    step_results,
)
from loadtests.report.document import conditions, write_experiment
from loadtests.report.rendering import print_tables, tables


def write(experiment: OverloadExperiment, out: Path) -> Path:
    """Write report.md, results.json and overload.svg in `out`, print the tables, and return the report's path."""
    plan, steps, recovered = experiment.plan, step_results(experiment), recoveries(experiment)
    arrivals = "Arrivals " + ", ".join(f"{rate:g}/s for {seconds:g} s" for rate, seconds in plan.steps)
    if plan.levels:
        multiples = ", ".join(f"{level:g}×" for level in plan.levels)
        arrivals = f"Arrivals at {multiples} of the saturated throughput for {plan.seconds:g} s each"
    pinned = f", generator on core {plan.generator_cores[0]} alone" if plan.generator_cores else ""
    what = conditions(experiment, f"{arrivals}, a deadline of {plan.deadline_ms:g} ms{pinned}")
    said = foretold(experiment)
    found = tables("overload_tables.txt.j2", title=what, steps=steps, recoveries=recovered, foretold=said)
    figures = {"steps": steps, "recoveries": recovered, "foretold": said}
    write_experiment(experiment, out, template="overload.md.j2", figures=figures, conditions=what, tables=found)
    _plot(experiment, out / "overload.svg")
    print_tables(*found, width=190)
    return out / "report.md"


def _plot(experiment: OverloadExperiment, path: Path) -> None:
    """Arrivals, answers in time, and their mean top-1 by second, in the first round that was measured."""
    plan = experiment.plan
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    first = [blocks[0] for blocks in measured_arms(experiment)]
    for block in first:
        for load in plan.connections or (STEPS,):
            label = block.arm if load == STEPS else f"{block.arm}, {load} connections"
            every, top1 = requests([block], load, plan.deadline_ms), block.info["top1"]
            edges = np.arange(math.ceil(every.due_s.max(initial=1.0)) + 1)
            middles = edges[:-1] + 0.5
            good = every[every.outcome == "in time"]
            counts, _ = np.histogram(good.due_s, bins=edges)
            percent = [top1.get(model, math.nan) * 100 for model in good.model.tolist()]
            sums, _ = np.histogram(good.due_s, bins=edges, weights=percent)
            (line,) = above.plot(middles, counts, label=f"{label}: in time")
            below.plot(middles, sums / np.where(counts, counts, math.nan), label=label)
            arrivals = np.histogram(every.due_s, bins=edges)[0]
            above.plot(middles, arrivals, color=line.get_color(), linestyle=":")
    above.set(ylabel="requests per second (dotted: arrivals)")
    if plan.levels:
        above.set_yscale("symlog", linthresh=10)
    above.set_ylim(bottom=0)
    below.set(ylabel="mean top-1, %", xlabel="seconds")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        if first:
            axes.legend(fontsize="small")
    figure.savefig(path)
