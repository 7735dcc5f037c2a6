"""Many runs of one recipe: several variants, several seeds, one table."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training import runs
from training.checkpoints import can_resume
from training.data import Dataset
from training.describe import count_macs
from training.loop import FROM_SCRATCH, Execution, Origin, TrainingError, run_identity, same_run, train
from training.models import Architecture, Record
from training.recipes import Recipe
from training.runs import Accuracy, RunError


class FinishedRun(Record):
    """The results of one run."""

    name: str
    variant: str
    seed: int
    git_commit: str | None
    params: int
    val_top1: float | None
    """Top-1 on the held-out train images after the last epoch."""
    accuracy: Accuracy | None
    minutes: float
    """Time in training steps."""
    architecture: Architecture
    curve: list[dict[str, float]]
    """The rows of metrics.csv."""


def study(
    recipe: Recipe,
    variants: Sequence[str],
    seeds: Sequence[int],
    dataset: Dataset,
    out: Path,
    on: Execution,
    origin_of: Callable[[int], Origin] = lambda _: FROM_SCRATCH,
) -> list[FinishedRun]:
    """Train each variant with each seed, all variants of a seed before the next seed, and return all finished runs.

    Finished runs are kept, stopped ones continued; one that fails is reported and left out. `origin_of` gives what the
    runs of a seed start from. Raises RunError if a folder holds a run of another recipe.
    """
    finished = []
    for seed, variant in product(seeds, variants):
        origin = origin_of(seed)
        seeded = recipe.model_copy(update={"seed": seed})
        part = f"-e{recipe.schedule.epochs:g}" if recipe.fit else ""
        folder = out / f"{recipe.name}{part}-{variant}-s{seed}"
        if not on.world.decide(partial(is_finished, folder, seeded, variant, dataset, origin)):
            on.say(f"[bold]{folder.name}[/]")
            try:
                resume = on.world.decide(partial(can_resume, folder))
                train(seeded, variant, dataset, folder, on, origin=origin, resume=resume)
            except TrainingError as error:
                on.say(f"[red]{folder.name} failed:[/] {error}")
                continue
        finished.append(on.world.decide(partial(read_run, folder)))
    return finished


def is_finished(folder: Path, recipe: Recipe, variant: str, dataset: Dataset, origin: Origin = FROM_SCRATCH) -> bool:
    """Whether `folder` holds this run, finished. Raises RunError if it holds another one."""
    if not (folder / runs.CARD_FILE).is_file():
        return False
    record = runs.read_record(folder)
    wanted = run_identity(recipe, variant, dataset, origin)
    found = {key: record.get(key) for key in wanted}
    if same_run(found) != same_run(wanted):
        raise RunError(f"{folder} was trained with other settings or data: choose another --out, or move it away")
    return True


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run from its folder."""
    card, record = runs.read_card(folder), runs.read_record(folder)
    curve = runs.read_metrics(folder / runs.METRICS_FILE)
    return FinishedRun(
        name=folder.name,
        variant=card.architecture.variant,
        seed=card.seed,
        git_commit=card.git_commit,
        params=record["params"],
        val_top1=curve[-1].get("val_top1"),
        accuracy=card.accuracy,
        minutes=round(record["train_seconds"] / 60, 1),
        architecture=card.architecture,
        curve=curve,
    )


def markdown_table(finished: Sequence[FinishedRun]) -> str:
    """One row per variant: means over seeds, with standard deviations if there are several."""
    lines = [
        "| variant | seeds | K/V tokens | parameters | MACs | held-out top-1 | test top-1 | test top-5 | minutes |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant, group in _by_variant(finished).items():
        spec, tested = group[0].architecture, [run.accuracy for run in group if run.accuracy]
        cells = [
            f"`{variant}`",
            ", ".join(str(run.seed) for run in group),
            f"{spec.kv_tokens} of {spec.tokens}",
            f"{group[0].params:,}",
            f"{sum(count_macs(spec).values()) / 1e6:,.1f} M",
            _percent([run.val_top1 for run in group]),
            _percent([accuracy.top1 for accuracy in tested]),
            _percent([accuracy.top5 for accuracy in tested]),
            f"{statistics.mean(run.minutes for run in group):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_report(finished: Sequence[FinishedRun], folder: Path) -> list[Path]:
    """Write study.md, study.json and the learning curves, curves.svg and curves.png, into `folder`."""
    table, records = folder / "study.md", folder / "study.json"
    folder.mkdir(parents=True, exist_ok=True)
    table.write_text(markdown_table(finished), encoding="utf-8")
    hidden: dict[str, Any] = {"architecture": True, "curve": True, "accuracy": {"correct"}}
    runs.write_json(records, {"runs": [run.model_dump(mode="json", exclude=hidden) for run in finished]})
    # Fixed ids and no date: equal runs give equal files.
    with mpl.rc_context({"svg.hashsalt": "stridevit"}):
        figure = _curves(finished)
        plots = [folder / "curves.svg", folder / "curves.png"]
        figure.savefig(plots[0], metadata={"Date": None})
        figure.savefig(plots[1], dpi=150)
    return [table, records, *plots]


def _curves(finished: Sequence[FinishedRun]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for number, (variant, group) in enumerate(_by_variant(finished).items()):
        for run in group:
            epochs = [row["epoch"] for row in run.curve]
            style = {"color": f"C{number}", "label": variant if run is group[0] else None, "linewidth": 1.2}
            loss.plot(epochs, [row["train_loss"] for row in run.curve], **style)
            if run.val_top1 is not None:
                accuracy.plot(epochs, [100 * row["val_top1"] for row in run.curve], **style)
    loss.set(xlabel="epoch", ylabel="training loss")
    accuracy.set(xlabel="epoch", ylabel="held-out top-1, %")
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    loss.legend(frameon=False)
    return figure


def _by_variant(finished: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    variants = dict.fromkeys(run.variant for run in finished)
    return {variant: [run for run in finished if run.variant == variant] for variant in variants}


def _percent(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{spread} %"
