"""Many runs of one recipe: several variants, several seeds, one table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from training import runs
from training.checkpoints import can_resume
from training.data import Dataset
from training.describe import count_macs
from training.distributed import World
from training.loop import TrainingError, run_identity, train
from training.recipes import Recipe
from training.runs import ModelCard, RunError


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a table says about one run. `curve` has the rows of metrics.csv; `minutes` are of training steps alone."""

    folder: Path
    card: ModelCard
    curve: list[dict[str, float]]
    parameters: int
    minutes: float

    @property
    def val_top1(self) -> float | None:
        """Top-1 on the held-out slice of train after the last epoch."""
        return self.curve[-1].get("val_top1")


def run_folder(out: Path, recipe: Recipe, variant: str) -> Path:
    """Where a study keeps the run of one variant and of the recipe's seed."""
    return out / f"{recipe.name}-{variant}-s{recipe.seed}"


def study(
    recipe: Recipe,
    variants: Sequence[str],
    seeds: Sequence[int],
    dataset: Dataset,
    out: Path,
    *,
    world: World,
    checkpoint_steps: int = 500,
    workers: int = 0,
    console: Console,
) -> list[FinishedRun]:
    """Train each variant with each seed, all variants of a seed before the next seed, and return all finished runs.

    A run that is finished already is left as it is, one that was stopped is continued, and one that fails is reported
    and left out. Raises RunError for a folder that holds a run of another recipe.
    """
    finished = []
    for seed in seeds:
        for variant in variants:
            chosen = recipe.model_copy(update={"seed": seed})
            folder = run_folder(out, chosen, variant)
            if not world.decide(partial(is_finished, folder, chosen, variant, dataset)):
                if world.main:
                    console.rule(folder.name)
                try:
                    train(
                        chosen,
                        variant,
                        dataset,
                        folder,
                        world=world,
                        resume=world.decide(partial(can_resume, folder)),
                        checkpoint_steps=checkpoint_steps,
                        workers=workers,
                        console=console,
                    )
                except TrainingError as error:
                    console.print(f"[red]{folder.name} failed:[/] {error}", soft_wrap=True)
                    continue
            finished.append(world.decide(partial(read_run, folder)))
    return finished


def is_finished(folder: Path, recipe: Recipe, variant: str, dataset: Dataset) -> bool:
    """Whether `folder` holds this finished run. Raises RunError if it is another one's."""
    if not (folder / runs.FINAL_FOLDER / runs.CARD_FILE).is_file():
        return False
    record = runs.read_record(folder)
    wanted = run_identity(recipe, variant, dataset)
    found = {**{key: record.get(key) for key in wanted}, "recipe": Recipe.model_validate(record["recipe"])}
    if found != {**wanted, "recipe": recipe}:
        raise RunError(f"{folder} was trained with other settings or data: choose another --out, or move it away")
    return True


def read_run(folder: Path) -> FinishedRun:
    """A finished run, from its folder."""
    card = runs.read_card(folder)
    record = runs.read_record(folder)
    return FinishedRun(
        folder=folder,
        card=card,
        curve=runs.read_metrics(folder / runs.METRICS_FILE),
        parameters=record["parameters"],
        minutes=record["train_seconds"] / 60,
    )


def markdown_table(finished: Sequence[FinishedRun]) -> str:
    """One row a variant: mean and, of several seeds, the standard deviation of its accuracies."""
    lines = [
        "| variant | seeds | K/V tokens | parameters | MACs | held-out top-1 | test top-1 | test top-5 | minutes |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant, group in _by_variant(finished).items():
        spec = group[0].card.architecture
        height, width = spec.grid
        cells = [
            f"`{variant}`",
            ", ".join(str(run.card.seed) for run in group),
            f"{spec.kv_tokens} of {height * width}",
            f"{group[0].parameters:,}",
            f"{sum(count_macs(spec).values()) / 1e6:,.1f} M",
            _percent([run.val_top1 for run in group]),
            _percent([run.card.accuracy.top1 if run.card.accuracy else None for run in group]),
            _percent([run.card.accuracy.top5 if run.card.accuracy else None for run in group]),
            f"{statistics.mean(run.minutes for run in group):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_report(finished: Sequence[FinishedRun], folder: Path) -> list[Path]:
    """Write study.md, study.json and the learning curves, curves.svg and curves.png, into `folder`."""
    table, records = folder / "study.md", folder / "study.json"
    folder.mkdir(parents=True, exist_ok=True)
    table.write_text(markdown_table(finished), encoding="utf-8")
    runs.write_json(
        records,
        {
            "runs": [
                {
                    "name": run.folder.name,
                    "variant": run.card.architecture.variant,
                    "seed": run.card.seed,
                    "git_commit": run.card.git_commit,
                    "val_top1": run.val_top1,
                    "accuracy": run.card.accuracy.model_dump(exclude={"correct"}) if run.card.accuracy else None,
                    "minutes": round(run.minutes, 1),
                }
                for run in finished
            ]
        },
    )
    # Fixed ids and no date: equal runs draw equal files.
    with mpl.rc_context({"svg.hashsalt": "stridevit"}):
        figure = _curves(finished)
        pictures = [folder / "curves.svg", folder / "curves.png"]
        figure.savefig(pictures[0], metadata={"Date": None})
        figure.savefig(pictures[1], dpi=150)
    return [table, records, *pictures]


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
    groups: dict[str, list[FinishedRun]] = {}
    for run in finished:
        groups.setdefault(run.card.architecture.variant, []).append(run)
    return groups


def _percent(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{spread} %"
