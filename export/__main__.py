"""`python -m export`: publish finished runs as bundles, prove bundles again, and show what they are."""

import contextlib
import itertools
import logging
import re
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from export import profile_report
from export.bundles import export
from export.descriptions import card, difference, kernel_table, listing, summary
from export.graph import OPSET, OPSETS, ExportError
from export.profile import Arm, Form, Setup, bundle_arm, estimated_seconds, measure, operators, random_arm
from export.sources import finished_run, random_weights
from export.verify import read_graph
from export.verify import verify as verify_bundle
from service.bundle import read_bundle
from service.engine import resolve_device
from service.errors import BundleError, EngineError
from service.host import available_cores
from service.manifest import Precision
from training.models import PRESETS, architecture
from training.readers import DataError
from training.runs import RunError
from training.variants import REGISTERED

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Export trained models to bundles: plain ONNX with uint8 input, normalisation inside and a dynamic batch,
    proven against torch on real images before anything is published.""",
)
console = Console(stderr=True)


@app.command()
def run(
    repository: Annotated[Path, typer.Option(help="Folder of bundles to publish into.")],
    folder: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Folder of a finished run.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            envvar="STRIDEVIT_DATA",
            metavar="DIR|hub:OWNER/NAME",
            help="The data set, as in training: its test images prove the export, and its train images find the ranges "
            "of int8. Not needed for `digits`.",
        ),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Models that may stand in for each other. [the data set's name]")
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="fp16 is for GPUs, int8 for CPUs; int8-dynamic is int8 for one image at a time."),
    ] = "fp32",
    opset: Annotated[
        int,
        typer.Option(
            min=OPSETS[0], max=OPSETS[-1], help=f"Below {OPSET}, attention is written as its parts, for older runtimes."
        ),
    ] = OPSET,
    accept_accuracy_loss: Annotated[
        bool, typer.Option("--accept-accuracy-loss", help="Publish even if more than half a point of top-1 is lost.")
    ] = False,
    random: Annotated[
        bool, typer.Option("--random-weights", help="Instead of a run: untrained, to measure speed and memory.")
    ] = False,
    preset: Annotated[str, typer.Option(help=f"With --random-weights: {', '.join(PRESETS)}.")] = "vit-s16",
    img_size: Annotated[int | None, typer.Option(help="With --random-weights; the preset's by default.")] = None,
    variant: Annotated[str, typer.Option(help="With --random-weights.")] = "csra-r2",
) -> None:
    """Publish a run as the next version of `<family>-<variant>`; random weights as `<preset>-<size>-random-<variant>`.

    Other precisions than fp32 add `-<precision>` to the name. Their accuracy is measured on the full test split.

    Example: `python -m export run runs/digits-csra-r2 --repository models`

    Example: `python -m export run runs/digits-csra-r2 --precision int8 --repository models`

    Example: `python -m export run --random-weights --preset vit-s16 --variant csra-r2 --repository /tmp/models`
    """
    if (folder is None) != random:
        raise typer.BadParameter("name a RUN, or give --random-weights, and not both")
    _quieten_exporter()
    with _errors(), console.status(f"exporting {folder or variant} as {precision}"):
        published = export(
            finished_run(folder, data) if folder else random_weights(architecture(preset, variant, img_size=img_size)),
            repository,
            family=family,
            precision=precision,
            opset=opset,
            accept_accuracy_loss=accept_accuracy_loss,
        )
    typer.echo(summary(read_bundle(published)))


BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of one version, such as models/x/1.")]


@app.command()
def verify(bundle: BundleArgument) -> None:
    """Prove a bundle again from its files alone: digests, manifest, operators, shapes, golden outputs.

    Example: `python -m export verify models/cifar100-csra-r2/3`
    """
    with _errors():
        checks = verify_bundle(bundle)
    for check in checks:
        typer.echo(f"ok  {check.name:<9} {check.found}")


@app.command(name="list")
def list_(repository: Annotated[Path, typer.Option(help="Folder of bundles.")] = Path("models")) -> None:
    """All models of a repository and their versions; a broken one says why."""
    with _errors():
        Console().print(listing(repository))


@app.command()
def inspect(bundle: BundleArgument) -> None:
    """What a bundle is: variant, accuracy, size, operators, where it comes from."""
    with _errors():
        Console().print(card(read_bundle(bundle)))


@app.command()
def diff(
    one: BundleArgument,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Folder of the other version.")],
) -> None:
    """What differs between two bundles. Exits with 0 if nothing does, else with 1, as diff does."""
    with _errors():
        table = difference(read_bundle(one), read_bundle(other))
    if table.row_count:
        Console().print(table)
        raise typer.Exit(1)
    typer.echo("no difference")


@app.command()
def kernels(bundle: BundleArgument) -> None:
    """Whether CUDA and TensorRT have a kernel for each node of a bundle, by their documentation. Exits with 1 if not.

    Example: `python -m export kernels models/cifar100-csra-r2/3`
    """
    with _errors():
        table, missing = kernel_table(read_graph(read_bundle(bundle)))
    Console().print(table)
    if missing:
        raise typer.Exit(1)


@app.command()
def profile(
    bundles: Annotated[
        list[Path] | None, typer.Argument(metavar="[BUNDLE]...", help="Bundles to compare, instead of random weights.")
    ] = None,
    preset: Annotated[str, typer.Option(help=f"Of random weights: {', '.join(PRESETS)}.")] = "vit-s16",
    img_size: Annotated[int | None, typer.Option(help="Of random weights; the preset's by default.")] = None,
    variants: Annotated[
        str, typer.Option(help="Of random weights, separated by commas; ratios are to the first.")
    ] = ",".join(REGISTERED),
    precisions: Annotated[str, typer.Option(help="Of random weights: fp32, fp16, int8, int8-dynamic.")] = "fp32",
    opsets: Annotated[str, typer.Option(help=f"Of random weights: {OPSETS[0]} to {OPSETS[-1]}.")] = str(OPSET),
    forms: Annotated[
        str, typer.Option(help="Of random weights: shaped, as served; unshaped, as torch's exporter writes it.")
    ] = "shaped",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each model; fewer than 5 give no interval.")] = 10,
    seconds: Annotated[float, typer.Option(min=0.05, help="Of each measurement.")] = 2.0,
    threads: Annotated[int | None, typer.Option(min=1, help="On a CPU; those this process may use by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or tensorrt.")] = "auto",
    by_operator: Annotated[
        bool, typer.Option("--by-operator", help="Then, where the time goes, at the largest batch size.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for profile.md, .json, .svg and .png; printed only by default.")
    ] = None,
) -> None:
    """Throughput, latency and peak memory of the engine alone, models side by side in interleaved rounds.

    Ctrl-C ends with what whole rounds have shown. On a GPU, nothing else may use it: memory is the whole device's.

    Example: `python -m export profile --preset vit-s16 --img-size 384 --batch 1,8 --out profile`

    Example: `python -m export profile models/cifar100-mha/3 models/cifar100-mha-int8/1`
    """
    _quieten_exporter()
    with _errors(), tempfile.TemporaryDirectory() as folder:
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", batch):
            raise ValueError(f"batch sizes {batch!r} are not whole numbers separated by commas, such as 1,8")
        kind, number = resolve_device(device)
        setup = Setup(
            batches=tuple(map(int, batch.split(","))),
            rounds=rounds,
            seconds=seconds,
            threads=threads or available_cores(),
            device=f"cuda:{number}" if kind == "cuda" else kind,
        )
        with console.status("exporting random weights"):
            arms = [bundle_arm(path) for path in bundles or []] or list(
                _random_arms(Path(folder), preset, img_size, variants, precisions, opsets, forms)
            )
        console.print(f"about {estimated_seconds(arms, setup) / 60:.0f} minutes for {len(arms)} models")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=len(arms) * len(setup.batches) * rounds)
            measured = measure(arms, setup, lambda what: progress.update(bar, description=what, advance=1))
        Console().print(profile_report.table(measured))
        if by_operator and measured.rounds == rounds:
            Console().print(profile_report.operator_table(operators(arms, setup, Path(folder))))
        if out:
            console.print("wrote " + ", ".join(map(str, profile_report.write(measured, out))), soft_wrap=True)
    if measured.rounds < rounds:
        console.print(f"interrupted: {measured.rounds} of {rounds} rounds")
        raise typer.Exit(128 + signal.SIGINT)


def _random_arms(
    folder: Path, preset: str, img_size: int | None, variants: str, precisions: str, opsets: str, forms: str
) -> Iterator[Arm]:
    """One for each combination; a label names what there is more than one of."""
    lists = [text.split(",") for text in (precisions, opsets, forms)]
    for variant, *rest in itertools.product(variants.split(","), *lists):
        precision, opset, form = rest
        shown = [
            text for text, values in zip((precision, f"opset {opset}", form), lists, strict=True) if len(values) > 1
        ]
        yield random_arm(
            architecture(preset, variant, img_size=img_size),
            folder,
            label=" ".join([variant, *shown]),
            precision=_one_of(Precision, precision),
            opset=int(opset),
            form=_one_of(Form, form),
        )


def _one_of(choices: Any, text: str) -> Any:
    """`text`, if it is one of a Literal's values. Raises ValueError naming them."""
    if text not in get_args(choices):
        raise ValueError(f"unknown {text!r}: choose from {', '.join(get_args(choices))}")
    return text


def _quieten_exporter() -> None:
    """It reports its own progress at length; what matters is checked and raised as an error."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    # onnxruntime.quantization writes to the root logger, that the model might be pre-processed first.
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch")


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What the user can mend, as one line that says how."""
    try:
        yield
    except (ExportError, RunError, DataError, BundleError, EngineError, ValueError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app(prog_name="python -m export")
