"""What `stridevit loadtest overload` found: a table of steps, a page, and a plot over time."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from loadtests.overload.measure import OverloadExperiment, Requests, StepResult, step_results
from loadtests.report.document import conditions, write_experiment
from loadtests.report.rendering import UNKNOWN, Table, print_tables


def table(steps: list[StepResult], *, title: str = "") -> Table:
    """One row per arm and step."""
    rows = []
    for step in steps:
        low, high = step.goodput_range
        outcomes = (step.within_deadline, step.refused, step.too_late, step.failed)
        rates = (f"{step.offered_rate:.0f}", f"{step.goodput:.0f} ({low:.0f}–{high:.0f})")
        quality = (_known(step.p99_ms, ".0f"), _known(step.mean_top1, ".2%"))
        rows.append((step.arm, *rates, *(f"{fraction:.1%}" for fraction in outcomes), *quality))
    headings = ("model or family", "arrivals/s", "in time/s (rounds)", "in time", "refused", "too late", "failed")
    return Table(title=title, headings=(*headings, "p99 ms", "mean top-1"), rows=rows)


def _known(value: float, form: str) -> str:
    return UNKNOWN if math.isnan(value) else format(value, form)


def write(experiment: OverloadExperiment, out: Path) -> Path:
    """Write report.md, results.json and overload.svg in `out`, print the table, and return the report's path."""
    plan, steps = experiment.plan, step_results(experiment)
    arrivals = ", ".join(f"{rate:g}/s for {seconds:g} s" for rate, seconds in plan.steps)
    what = conditions(experiment, f"Arrivals {arrivals}, a deadline of {plan.deadline_ms:g} ms")
    found = table(steps, title=what)
    write_experiment(experiment, out, template="overload.md.j2", figures={"steps": steps}, conditions=what, steps=found)
    _plot(experiment, out / "overload.svg")
    print_tables(found, width=150)
    return out / "report.md"


def _plot(experiment: OverloadExperiment, path: Path) -> None:
    """Arrivals, answers in time, and their mean top-1 by second, in the first round that was measured."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    seconds = int(experiment.plan.seconds)
    edges = np.arange(seconds + 1)
    first = [blocks[0] for arm in experiment.plan.arms if (blocks := experiment.blocks_of(arm.label))]
    for block in first:
        requests, top1 = Requests([block], experiment.plan.deadline_ms), block.info["top1"]
        due_s, models = requests.due_s[requests.good], requests.models[requests.good].tolist()
        counts, _ = np.histogram(due_s, bins=edges)
        sums, _ = np.histogram(due_s, bins=edges, weights=[top1.get(model, math.nan) * 100 for model in models])
        means = np.divide(sums, counts, where=counts > 0, out=np.full(seconds, np.nan))
        above.plot(edges[:-1] + 0.5, counts, label=f"{block.arm}: in time")
        below.plot(edges[:-1] + 0.5, means, label=block.arm)
        if block is first[-1]:
            due, _ = np.histogram(requests.due_s, bins=edges)
            above.plot(edges[:-1] + 0.5, due, color="grey", linestyle=":", label="arrivals")
    above.set_ylabel("requests per second")
    above.set_ylim(bottom=0)
    below.set_ylabel("mean top-1, %")
    below.set_xlabel("seconds")
    for axes in (above, below):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path)
