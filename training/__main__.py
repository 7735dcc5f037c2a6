"""`python -m training`: train, evaluate, describe and compare variants; write a data set's test images as files."""

import contextlib
import csv
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from training import runs
from training.augment import default_workers
from training.checkpoints import can_resume
from training.data import Dataset, load_dataset
from training.describe import describe as describe_model
from training.distributed import World, join
from training.evaluate import accuracy_of
from training.evaluate import evaluate as evaluate_model
from training.loop import TrainingError
from training.loop import train as train_run
from training.models import PRESETS, architecture
from training.readers import DataError
from training.recipes import RECIPES, Recipe, load_recipe
from training.stopping import Stopped
from training.study import markdown_table, write_report
from training.study import study as run_study
from training.tables import class_table, confusion_table, description_table, evaluation_record
from training.throughput import measure
from training.variants import REGISTERED, parse_variant

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Train Vision Transformers with compressed keys and values.

    A **recipe** names the preset, the data and the schedule; a **variant** is the attention: `mha`, `lsra-rR` or
    `csra-rR`. All variants of a recipe start from equal weights outside attention and see equal data in equal order.

    **Data**, for `--data`: a folder with `train-*.parquet` and `test-*.parquet`, or with WebDataset shards
    `train-*.tar` and `validation-*.tar`, or with a folder a class in `train/` and `val/`; or `hub:OWNER/NAME` from the
    Hugging Face hub.

    **Several GPUs or machines**: `torchrun --nproc-per-node 8 -m training train ...`; the batch size of the recipe is
    divided among the processes.
    """,
)
console = Console(stderr=True)

DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        envvar="STRIDEVIT_DATA",
        metavar="DIR|hub:OWNER/NAME",
        help="The data set's files, or the folder above them, or its name on the hub. Not needed for `digits`.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="`auto` takes a GPU where torch sees one; else `cpu`, `cuda`, `cuda:1`.")
]
RecipeOption = Annotated[str, typer.Option(help=f"One of: {', '.join(RECIPES)}.")]
OverridesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's value: optim.lr=5e-4. May be repeated."),
]
CheckpointOption = Annotated[
    int, typer.Option("--checkpoint-steps", min=1, help="Steps between checkpoints, beside one at each epoch's end.")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=0, help="Processes that decode images from disk; one a core by default.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def train(
    recipe: RecipeOption,
    variant: Annotated[str, typer.Option(help="`mha`, `lsra-rR` or `csra-rR`, such as csra-r2.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; its name becomes the model's.")],
    data: DataOption = None,
    preset: Annotated[str | None, typer.Option(help=f"Another model size: {', '.join(PRESETS)}.")] = None,
    overrides: OverridesOption = None,
    resume: Annotated[bool, typer.Option(help="Continue a stopped run after its last checkpoint.")] = False,
    test: Annotated[
        bool, typer.Option(help="Evaluate on the test split at the end; `--no-test` for runs that decide something.")
    ] = True,
    checkpoint_steps: CheckpointOption = 500,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Train one variant; the folder then holds `final/`, which export and evaluate read.

    Ctrl-C and SIGTERM save a checkpoint first; `--resume` goes on with the very next step.

    Example: `python -m training train --recipe digits --variant csra-r2 --out runs/digits-csra-r2`
    """

    def how_to_go_on() -> str:
        return f"continue with: --out {out} --resume" if can_resume(out) else "nothing was saved: start it again"

    with _errors(how_to_go_on), join(_device(device)) as world:
        resolved = load_recipe(recipe, ([f"preset={preset}"] if preset else []) + (overrides or []))
        train_run(
            resolved,
            variant,
            _dataset(resolved, data),
            out,
            world=world,
            resume=resume,
            test=test,
            checkpoint_steps=checkpoint_steps,
            workers=_workers(workers),
            console=console,
        )


@app.command()
def study(
    recipe: RecipeOption,
    out: Annotated[Path, typer.Option(help="Folder of the runs, one folder each: RECIPE-VARIANT-sSEED.")],
    variants: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(REGISTERED),
    seeds: Annotated[str, typer.Option(help="Separated by commas; all variants of one before the next.")] = "0",
    report: Annotated[
        Path | None, typer.Option(help="Folder for the table and the curves; `--out` by default.")
    ] = None,
    data: DataOption = None,
    overrides: OverridesOption = None,
    checkpoint_steps: CheckpointOption = 500,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Train several variants with several seeds; write a table of means ± standard deviations and learning curves.

    Finished runs are left as they are and stopped ones continued: give the same command again to go on.

    Example: `python -m training study --recipe digits --variants mha,csra-r2 --seeds 0,1,2 --out runs/digits`
    """
    with _errors(lambda: "the same command goes on from here"), join(_device(device)) as world:
        resolved = load_recipe(recipe, overrides)
        if not re.fullmatch(r"\d+(,\d+)*", seeds):
            raise ValueError(f"seeds {seeds!r} are not whole numbers separated by commas, such as 0,1,2")
        numbers = list(dict.fromkeys(map(int, seeds.split(","))))
        names = list(dict.fromkeys(str(parse_variant(name)) for name in variants.split(",")))
        finished = run_study(
            resolved,
            names,
            numbers,
            _dataset(resolved, data),
            out,
            world=world,
            checkpoint_steps=checkpoint_steps,
            workers=_workers(workers),
            console=console,
        )
        if finished and world.main:
            files = write_report(finished, report or out)
            typer.echo(markdown_table(finished))
            console.print("wrote " + ", ".join(map(str, files)), soft_wrap=True)
        if len(finished) < len(names) * len(numbers):
            raise typer.Exit(1)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    data: DataOption = None,
    img_size: Annotated[
        int | None, typer.Option(help="Evaluate at another size than it was trained at, such as 384.")
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Top-1 of every class, worst first.")] = False,
    confusions: Annotated[int, typer.Option(min=0, help="How many of the pairs confused most often to show.")] = 5,
    record: Annotated[
        bool, typer.Option("--record", help="Write the accuracy, and which images are right, into final/model.json.")
    ] = False,
    as_json: JsonOption = False,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Top-1 and top-5 of a finished run over the full test split of its data set, class by class if asked to."""
    with _errors():
        if record and img_size is not None:
            raise ValueError("--record is for the size that the model was trained at: leave out --img-size")
        model, card = runs.load_final(run, img_size=img_size)
        dataset = load_dataset(card.dataset, data, in_memory=False)
        if dataset.classes != card.labels:
            raise ValueError(
                f"{run} was trained on other classes ({len(card.labels)}, from {card.labels[0]!r}) than this data has "
                f"({len(dataset.classes)}, from {dataset.classes[0]!r}): name the data of {card.dataset} with --data"
            )
        world = World(device=_device(device))
        result = evaluate_model(
            model.to(world.device),
            dataset.test,
            num_classes=len(card.labels),
            preprocessing=card.preprocessing,
            world=world,
            # To start processes takes longer than to decode a small test split here.
            workers=_workers(0 if workers is None and len(dataset.test) <= 20_000 else workers),
        )
        if record:
            runs.save_accuracy(run, accuracy_of(result, dataset))
    if as_json:
        typer.echo(json.dumps(evaluation_record(card, dataset.test_split, result), indent=2))
        return
    typer.echo(
        f"{card.name}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.4f} "
        f"on {result.n} {dataset.test_split} images of {card.dataset}"
    )
    if per_class:
        Console().print(class_table(result, card.labels))
    if confusions:
        Console().print(confusion_table(result, card.labels, confusions))


@app.command()
def describe(
    preset: Annotated[str, typer.Option(help=f"One of: {', '.join(PRESETS)}.")],
    img_size: Annotated[int | None, typer.Option(help="Another image size than the preset's.")] = None,
    variants: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(REGISTERED),
    num_classes: Annotated[int | None, typer.Option(min=1, help="Another number of classes than the preset's.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Another rank of the latent than the preset's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What each variant of a preset costs for one image: parameters, multiply-accumulates, attention memory.

    Example: `python -m training describe --preset vit-s16 --img-size 384`
    """
    with _errors():
        described = [
            describe_model(architecture(preset, name, num_classes=num_classes, img_size=img_size, rank=rank))
            for name in variants.split(",")
        ]
    if as_json:
        typer.echo(json.dumps([one.model_dump(mode="json") for one in described], indent=2))
        return
    Console().print(description_table(described))


@app.command()
def profile(
    recipe: RecipeOption,
    variant: Annotated[str, typer.Option(help="`mha`, `lsra-rR` or `csra-rR`, such as csra-r2.")],
    overrides: OverridesOption = None,
    steps: Annotated[int, typer.Option(min=5, help="Steps to time, after a warm-up.")] = 30,
    operators: Annotated[int, typer.Option(min=0, help="How many of the costliest operators to show.")] = 10,
    device: DeviceOption = "auto",
) -> None:
    """Throughput of training on random images, and where a step's time goes: to choose precision, batch and compile.

    Example: `python -m training profile --recipe cifar100-xs --variant mha --set precision=fp32`
    """
    with _errors():
        measured = measure(load_recipe(recipe, overrides), variant, world=World(device=_device(device)), steps=steps)
    typer.echo(
        f"{variant}: {measured.images_per_s:.0f} images/s, median of {steps} steps "
        f"(slowest tenth {measured.slowest:.0f}, fastest {measured.fastest:.0f}) "
        f"on {torch.get_num_threads()} threads; data {measured.data_share:.1%}"
    )
    table = Table("operator", "share", "calls a step")
    for name, share, calls in measured.operators[:operators]:
        table.add_row(escape(name), f"{share:.1%}", f"{calls:.0f}")
    Console().print(table)


@app.command()
def images(
    dataset: Annotated[str, typer.Option(help="`digits`, `cifar100`, or any name for what --data holds.")],
    out: Annotated[Path, typer.Option(help="Folder to fill with PNG files and labels.csv.")],
    data: DataOption = None,
    count: Annotated[int, typer.Option(min=1, help="How many, from the start of the test split.")] = 360,
) -> None:
    """Write test images as PNG files with a labels.csv, to ask a service about or to load-test it with."""
    with _errors():
        loaded = load_dataset(dataset, data, in_memory=False)
        out.mkdir(parents=True, exist_ok=True)
        with (out / "labels.csv").open("w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(["file", "index", "label"])
            for row in range(min(count, len(loaded.test))):
                file, label = f"{row:05d}.png", int(loaded.test.labels[row])
                loaded.test.read(row).save(out / file)
                table.writerow([file, label, loaded.classes[label]])
    typer.echo(f"{out}: {min(count, len(loaded.test))} images")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no GPU: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name} was asked for, but torch sees {torch.cuda.device_count()} GPUs, from cuda:0 on"
        )
    return device


def _dataset(recipe: Recipe, data: str | None) -> Dataset:
    return load_dataset(recipe.dataset, data, in_memory=recipe.in_memory)


def _workers(asked: int | None) -> int:
    return default_workers() if asked is None else asked


@contextlib.contextmanager
def _errors(how_to_go_on: Callable[[], str] = lambda: "nothing was changed") -> Iterator[None]:
    """What the user can mend, as one line that says how; and an early end, with what to do next."""
    try:
        yield
    except (Stopped, KeyboardInterrupt) as stop:
        if os.environ.get("RANK", "0") == "0":
            console.print(f"\n{str(stop) or 'interrupted'}; {how_to_go_on()}", highlight=False, soft_wrap=True)
        raise typer.Exit(128 + (stop.signum if isinstance(stop, Stopped) else signal.SIGINT)) from None
    except (ValueError, DataError, TrainingError, runs.RunError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    process = f" of process {rank}" if (rank := os.environ.get("RANK")) else ""
    console.print(f"[red]error{process}:[/] {escape(message)}", highlight=False, soft_wrap=True)
    if process:
        # The other processes may be waiting for this one, and its own clean-up for them: torchrun ends all.
        sys.stderr.flush()
        os._exit(1)
    raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m training")
