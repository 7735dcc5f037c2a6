"""`python -m training`: train a variant, evaluate it, or write a data set's test images as files."""

import csv
from pathlib import Path
from typing import Annotated, NoReturn, get_args

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.markup import escape

from training import runs
from training.data import DataError, load_dataset
from training.evaluate import evaluate as evaluate_model
from training.loop import TrainingError
from training.loop import train as train_run
from training.models import PRESETS
from training.recipes import RECIPES, DatasetName, load_recipe

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Train Vision Transformers with compressed keys and values.

    A **recipe** names the preset, the data and the schedule; a **variant** is the attention: `mha`, `lsra-rR` or
    `csra-rR`. All variants of a recipe start from equal weights outside attention and see equal data in equal order.
    """,
)
console = Console(stderr=True)

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        envvar="STRIDEVIT_DATA",
        help="Folder with the data set's files, or the folder above it. Not needed for `digits`.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="`auto` takes a GPU where torch sees one; else `cpu`, `cuda`, `cuda:1`.")
]


@app.command()
def train(
    recipe: Annotated[str, typer.Option(help=f"One of: {', '.join(RECIPES)}.")],
    variant: Annotated[str, typer.Option(help="`mha`, `lsra-rR` or `csra-rR`, such as csra-r2.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; its name becomes the model's.")],
    data: DataOption = None,
    preset: Annotated[str | None, typer.Option(help=f"Another model size: {', '.join(PRESETS)}.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's value: optim.lr=5e-4."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue a stopped run after its last full epoch.")] = False,
    test: Annotated[
        bool, typer.Option(help="Evaluate on the test split at the end; `--no-test` for runs that decide something.")
    ] = True,
    device: DeviceOption = "auto",
) -> None:
    """Train one variant; the folder then holds `final/`, which export and evaluate read.

    Example: `python -m training train --recipe digits --variant csra-r2 --out runs/digits-csra-r2`
    """
    chosen = [f"preset={preset}"] if preset else []
    try:
        resolved = load_recipe(recipe, chosen + (overrides or []))
        dataset = load_dataset(resolved.dataset, data)
        train_run(resolved, variant, dataset, out, device=_device(device), resume=resume, test=test, console=console)
    except (ValueError, DataError, TrainingError, runs.RunError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        how = (
            f"continue with: --out {out} --resume" if runs.can_resume(out) else "no epoch was finished: start it again"
        )
        console.print(f"\nstopped; {how}")
        raise typer.Exit(130) from None


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    data: DataOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Top-1 and top-5 of a finished run over the full test split of its data set."""
    try:
        model, card = runs.load_final(run)
        dataset = load_dataset(card.dataset, data)
        where = _device(device)
    except (ValueError, DataError, runs.RunError) as error:
        _fail(str(error))
    result = evaluate_model(model.to(where), dataset.test, device=where)
    typer.echo(
        f"{card.name}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.4f} "
        f"on {len(dataset.test)} test images of {card.dataset}"
    )


@app.command()
def images(
    dataset: Annotated[str, typer.Option(help=f"One of: {', '.join(get_args(DatasetName))}.")],
    out: Annotated[Path, typer.Option(help="Folder to fill with PNG files and labels.csv.")],
    data: DataOption = None,
    count: Annotated[int, typer.Option(min=1, help="How many, from the start of the test split.")] = 360,
) -> None:
    """Write test images as PNG files with a labels.csv, to ask a service about or to load-test it with."""
    try:
        loaded = load_dataset(dataset, data)
    except DataError as error:
        _fail(str(error))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "labels.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["file", "index", "label"])
        for row in range(min(count, len(loaded.test))):
            file, label = f"{row:05d}.png", int(loaded.test.labels[row])
            Image.fromarray(loaded.test.images[row]).save(out / file)
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
    return device


def _fail(message: str) -> NoReturn:
    console.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m training")
