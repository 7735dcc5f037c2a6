"""`python -m training`: train, evaluate, describe and compare variants; write a data set's test images as files."""

import contextlib
import csv
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.markup import escape

from training import folder_recipe, runs
from training.augment import default_workers
from training.checkpoints import can_resume
from training.data import Dataset, load_dataset
from training.describe import cost_table
from training.describe import describe as describe_model
from training.distributed import PeerLost, World, choose_device, join
from training.evaluate import evaluate as evaluate_model
from training.initial import TIMM, Source, SourceError, open_source
from training.loop import FROM_SCRATCH, Execution, Origin, TrainingError
from training.loop import train as train_run
from training.models import PRESETS, architecture
from training.options import (
    ALL_VARIANTS,
    MAX_EPOCHS,
    AnyRecipeOption,
    AutoResumeOption,
    CheckpointOption,
    DataOption,
    DeviceOption,
    EpochsOption,
    JsonOption,
    OverridesOption,
    RecipeOption,
    ResumeOption,
    TestOption,
    VariantOption,
    VariantsOption,
    WeightsOption,
    WorkersOption,
)
from training.readers import DataError
from training.recipes import RECIPES, load_recipe, overridden
from training.resolve import epochs_change, load_for, prepare, retrofit_origin, retrofit_recipe, with_short_warmup
from training.stopping import Stopped
from training.study import markdown_table, write_report
from training.study import study as run_study
from training.throughput import measure
from training.variants import parse_variant

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Train Vision Transformers with compressed keys and values.

    A **recipe** sets the preset, the data and the schedule; a **variant** is the kind of attention: `mha`, `lsra-rR` or
    `csra-rR`. All variants of a recipe start from the same weights outside attention and see the same data in the same
    order.

    **Your pictures**: `stridevit train --data photos/ --variant csra-r2`, with a folder per class in `photos/`. A tenth
    of each class is held out to test.

    **Data**, for `--data`: such a folder; or one with `train-*.parquet` and `test-*.parquet`, or with WebDataset shards
    `train-*.tar` and `validation-*.tar`, or with one folder per class in `train/` and `val/`; or `hub:OWNER/NAME` from
    the Hugging Face hub.

    **Several GPUs or machines**: `torchrun --nproc-per-node 8 -m training train ...`; the batch size of the recipe is
    divided among the processes. On each of two machines, with an `--out` that both share: `torchrun --nnodes 2
    --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --max-restarts 3 -m training train --auto-resume
    ...`; docs/training.md says what happens when one of them fails.
    """,
)
console = Console(stderr=True)


@app.command()
def train(
    variant: VariantOption,
    recipe: AnyRecipeOption = folder_recipe.NAME,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; its name becomes the model's. [default: runs/DATA-VARIANT]")
    ] = None,
    data: DataOption = None,
    preset: Annotated[str | None, typer.Option(help=f"Model size, if not the recipe's: {', '.join(PRESETS)}.")] = None,
    epochs: EpochsOption = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|FILE|timm:NAME",
            help="Start from the weights of a run, of a safetensors file with timm's names, or of a timm model.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|timm:NAME", help="Also learn from this model: half of the loss, or as --set distill.* sets."
        ),
    ] = None,
    weights: WeightsOption = None,
    overrides: OverridesOption = None,
    resume: ResumeOption = False,
    auto_resume: AutoResumeOption = False,
    test: TestOption = True,
    checkpoint_steps: CheckpointOption = 500,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Train one variant. The finished model is in the folder's `final/`, for `evaluate` and for export.

    Ctrl-C and SIGTERM save a checkpoint first; `--resume` continues with the next step. Under torchrun, and wherever
    a failed command is restarted automatically, use `--auto-resume`.

    With `--init`, the model's sizes and its image normalisation are those of the source, unless `--preset` or `--set`
    changes them; every weight whose name and shape match is copied. For a compressed variant of a trained MHA model,
    use `retrofit`, which also fits its keys and values.

    Example: `stridevit train --recipe digits --variant csra-r2 --out runs/digits-csra-r2`

    Example: `stridevit train --recipe cifar100-full --variant mha --data DIR --init runs/stage1 --out runs/stage2`

    Example, on each of two machines (docs/training.md): `torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d
    --rdzv-endpoint HOST:29500 --max-restarts 3 -m training train --variant mha --data DIR --out SHARED/x --auto-resume`
    """
    name = folder_recipe.dataset_name(data) if recipe == folder_recipe.NAME and data else recipe
    folder = out or Path("runs") / f"{name}-{variant}"
    with _errors(folder), join(choose_device(device)) as world:
        changes = [*([f"preset={preset}"] if preset else []), *epochs_change(epochs), *(overrides or [])]
        origin = Origin(
            init=open_source(init, weights if init.startswith(TIMM) else None) if init else None,
            teacher=open_source(teacher, weights if teacher.startswith(TIMM) else None) if teacher else None,
        )
        if weights and not any(name and name.startswith(TIMM) for name in (init, teacher)):
            raise ValueError("--weights are those of timm:NAME, which neither --init nor --teacher names")
        resolved, dataset = prepare(recipe, data, changes, origin.init, world.device)
        resolved = with_short_warmup(resolved, epochs, changes)
        if teacher and not (resolved.distill.logits or resolved.distill.blocks):
            resolved = overridden(resolved, ["distill.logits=0.5"])
        on = _execution(world, workers, checkpoint_steps)
        _warn(on, dataset)
        train_run(resolved, variant, dataset, folder, on, origin=origin, resume=_resume(resume, auto_resume), test=test)


@app.command()
def retrofit(
    teacher: Annotated[
        str,
        typer.Option(metavar="RUN|timm:NAME", help="The trained `mha` model."),
    ],
    variant: VariantOption,
    out: Annotated[Path, typer.Option(help="Folder of the run; its name becomes the model's.")],
    data: DataOption = None,
    epochs: Annotated[
        float, typer.Option(min=0, max=MAX_EPOCHS, help="0 only fits and evaluates; 0.5 is half an epoch.")
    ] = 2.0,
    recipe: Annotated[
        str | None,
        typer.Option(help=f"`folder` or one of: {', '.join(RECIPES)}. [default: the run's; `folder` for timm:NAME]"),
    ] = None,
    weights: WeightsOption = None,
    overrides: OverridesOption = None,
    resume: ResumeOption = False,
    auto_resume: AutoResumeOption = False,
    test: TestOption = True,
    checkpoint_steps: CheckpointOption = 500,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Turn a trained MHA model into a compressed variant: fit its keys and values, then distil for a few epochs.

    The low-rank keys and values come from singular values and least squares on train images; then the student learns
    from the labels, the teacher's probabilities and the outputs of its blocks. docs/retrofit.md has the mathematics
    and what it costs in accuracy.

    Example: `stridevit retrofit --teacher runs/my-mha --variant csra-r2 --data DIR --out runs/my-csra-r2`

    Example: `stridevit retrofit --teacher timm:vit_small_patch16_224 --recipe imagenet-s16 --variant csra-r2 --data DIR
    --out runs/vit-s-csra-r2`
    """
    with _errors(out), join(choose_device(device)) as world:
        source = open_source(teacher, weights)
        resolved = retrofit_recipe(source, recipe, epochs, overrides, data, world.device)
        dataset = load_for(resolved, data, source)
        on = _execution(world, workers, checkpoint_steps)
        _warn(on, dataset)
        origin = retrofit_origin(resolved, source)
        train_run(resolved, variant, dataset, out, on, origin=origin, resume=_resume(resume, auto_resume), test=test)


@app.command()
def study(
    recipe: RecipeOption,
    out: Annotated[Path, typer.Option(help="Folder for the runs, one folder each: RECIPE-VARIANT-sSEED.")],
    variants: VariantsOption = ALL_VARIANTS,
    seeds: Annotated[str, typer.Option(help="Separated by commas; all variants of a seed run before the next.")] = "0",
    report: Annotated[Path | None, typer.Option(help="Folder for the table and curves; `--out` by default.")] = None,
    data: DataOption = None,
    epochs: EpochsOption = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Retrofit this `mha` run instead; `{seed}` in its name stands for the seed."),
    ] = None,
    overrides: OverridesOption = None,
    checkpoint_steps: CheckpointOption = 500,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Train several variants with several seeds; write a table of means ± standard deviations and learning curves.

    Finished runs are kept and stopped ones continued: repeat the same command to go on. With `--teacher`, each run is a
    retrofit, and its folder is RECIPE-retrofit-eEPOCHS-VARIANT-sSEED.

    Example: `stridevit study --recipe digits --variants mha,csra-r2 --seeds 0,1,2 --out runs/digits`

    Example: `stridevit study --recipe cifar100-xs --teacher runs/released/cifar100-xs-mha-s{seed} --epochs 2
    --variants lsra-r2,csra-r2 --seeds 0,1,2 --data DIR --out runs/retrofit`
    """
    with _errors(), join(choose_device(device)) as world:
        if not re.fullmatch(r"\d+(,\d+)*", seeds):
            raise ValueError(f"seeds {seeds!r} are not whole numbers separated by commas, such as 0,1,2")
        numbers = list(dict.fromkeys(map(int, seeds.split(","))))
        names = list(dict.fromkeys(str(parse_variant(name)) for name in variants.split(",")))
        sources: dict[int, Source] = {}
        if teacher:
            sources = {seed: open_source(teacher.replace("{seed}", str(seed))) for seed in numbers}
            length = 2.0 if epochs is None else epochs
            resolved = retrofit_recipe(sources[numbers[0]], recipe, length, overrides, data, world.device)
        else:
            changes = [*epochs_change(epochs), *(overrides or [])]
            resolved = with_short_warmup(load_recipe(recipe, changes), epochs, changes)
        dataset = load_for(resolved, data, sources.get(numbers[0]))
        finished = run_study(
            resolved,
            names,
            numbers,
            dataset,
            out,
            _execution(world, workers, checkpoint_steps),
            lambda seed: retrofit_origin(resolved, sources[seed]) if sources else FROM_SCRATCH,
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
    img_size: Annotated[int | None, typer.Option(help="Image size instead of the training size, such as 384.")] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Top-1 of every class, worst first.")] = False,
    confusions: Annotated[int, typer.Option(min=0, help="Number of most confused pairs of classes to show.")] = 5,
    record: Annotated[bool, typer.Option("--record", help="Store accuracy and correct images in model.json.")] = False,
    as_json: JsonOption = False,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Top-1 and top-5 of a finished run on the full test split of its data set."""
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
        world = World(device=choose_device(device))
        if workers is None:
            # For a small test split, starting processes takes longer than decoding in this one.
            workers = default_workers() if len(dataset.test) > 20_000 else 0
        result = evaluate_model(
            model.to(world.device),
            dataset.test,
            card.preprocessing,
            num_classes=len(card.labels),
            world=world,
            workers=workers,
        )
        if record:
            runs.save_accuracy(run, result.accuracy(dataset))
    if as_json:
        values = {"run": card.name, "dataset": card.dataset, "split": dataset.test_split, **result.record(card.labels)}
        typer.echo(json.dumps(values, indent=2))
        return
    typer.echo(
        f"{card.name}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.4f} "
        f"on {len(result.labels)} {dataset.test_split} images of {card.dataset}"
    )
    if per_class:
        Console().print(result.class_table(card.labels))
    if confusions:
        Console().print(result.confusion_table(card.labels, confusions))


@app.command()
def describe(
    preset: Annotated[str, typer.Option(help=f"One of: {', '.join(PRESETS)}.")],
    img_size: Annotated[int | None, typer.Option(help="Image size instead of the preset's.")] = None,
    variants: VariantsOption = ALL_VARIANTS,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Number of classes instead of the preset's.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the latent instead of the preset's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Costs of each variant of a preset for one image: parameters, multiply-accumulates, attention memory.

    Example: `stridevit describe --preset vit-s16 --img-size 384`
    """
    with _errors():
        described = [
            describe_model(architecture(preset, name, num_classes=num_classes, img_size=img_size, rank=rank))
            for name in variants.split(",")
        ]
    if as_json:
        typer.echo(json.dumps([one.model_dump(mode="json") for one in described], indent=2))
    else:
        Console().print(cost_table(described))


@app.command()
def profile(
    recipe: RecipeOption,
    variant: VariantOption,
    overrides: OverridesOption = None,
    steps: Annotated[int, typer.Option(min=5, help="Number of steps to time, after a warm-up.")] = 30,
    operators: Annotated[int, typer.Option(min=0, help="Number of most expensive operators to show.")] = 10,
    device: DeviceOption = "auto",
) -> None:
    """Training throughput on random images, and the operators that take the time: to choose precision and batch size.

    Example: `stridevit profile --recipe cifar100-xs --variant mha --set precision=fp32`
    """
    with _errors():
        world = World(device=choose_device(device))
        measured = measure(load_recipe(recipe, overrides), variant, world=world, steps=steps)
    typer.echo(
        f"{variant}: {measured.images_per_s:.0f} images/s, median of {steps} steps "
        f"(slowest tenth {measured.slowest:.0f}, fastest {measured.fastest:.0f}) "
        f"on {torch.get_num_threads()} threads; data {measured.data_share:.1%}"
    )
    Console().print(measured.operator_table(operators))


@app.command()
def images(
    dataset: Annotated[str, typer.Option(help="`digits`, `cifar100`, or any name for the data in --data.")],
    out: Annotated[Path, typer.Option(help="Folder for the PNG files and labels.csv.")],
    data: DataOption = None,
    count: Annotated[int, typer.Option(min=1, help="Number of images, from the start of the test split.")] = 360,
) -> None:
    """Write test images as PNG files with a labels.csv, to classify with a service or to load-test it with."""
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


def _execution(world: World, workers: int | None, checkpoint_steps: int) -> Execution:
    workers = default_workers() if workers is None else workers
    return Execution(world=world, workers=workers, checkpoint_steps=checkpoint_steps, console=console)


def _resume(resume: bool, auto: bool) -> bool | Literal["auto"]:
    if resume and auto:
        raise ValueError("--resume needs a checkpoint and --auto-resume does not: give one of the two")
    return "auto" if auto else resume


def _warn(on: Execution, dataset: Dataset) -> None:
    for note in dataset.notes:
        on.say(f"[yellow]warning:[/] {escape(note)}")


@contextlib.contextmanager
def _errors(run: Path | None = None) -> Iterator[None]:
    """Show errors that the user can fix in one line that says how; after an interruption, say how to continue."""
    process = os.environ.get("RANK")
    try:
        yield
    except (Stopped, KeyboardInterrupt) as stop:
        if run is None:
            hint = "repeat the same command to continue"
        elif can_resume(run):
            hint = f"continue with: --out {run} --resume"
        else:
            hint = "nothing was saved: start it again"
        if process in (None, "0"):
            console.print(f"\n{str(stop) or 'interrupted'}; {hint}", highlight=False, soft_wrap=True)
        raise typer.Exit(128 + (stop.signum if isinstance(stop, Stopped) else signal.SIGINT)) from None
    except (ValueError, DataError, SourceError, TrainingError, PeerLost, runs.RunError, OSError) as error:
        origin = f" of process {process}" if process else ""
        console.print(f"[red]error{origin}:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        if process:
            # Others may be waiting for this process, and its clean-up would wait for them; torchrun ends all of them.
            sys.stderr.flush()
            os._exit(1)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app(prog_name="python -m training")
