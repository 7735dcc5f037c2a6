"""`python -m export`: publish finished runs as bundles, check bundles, show and profile them."""

import contextlib
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
from rich.progress import Progress

from export import profile_report
from export.descriptions import card, difference, kernel_table, listing, summary
from export.graph import OPSET, OPSETS, ExportError
from export.probe import Runtime
from export.profile import (
    Form,
    Setup,
    bundle_arm,
    by_runtimes,
    estimated_seconds,
    measure,
    operators,
    random_arms,
)
from export.publish import export
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
    help="""Export trained models to bundles: plain ONNX with uint8 input, built-in normalisation and a dynamic batch,
    compared with torch on real images before anything is published.""",
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
            help="Data set, as in training; none for digits. Test images prove the export, others calibrate int8.",
        ),
    ] = None,
    family: Annotated[str | None, typer.Option(help="Family of the model; the data set's name by default.")] = None,
    precision: Annotated[Precision, typer.Option(help="fp16 for GPUs; int8 and int8-dynamic for CPUs.")] = "fp32",
    opset: Annotated[
        int, typer.Option(min=OPSETS[0], max=OPSETS[-1], help=f"Below {OPSET} attention is decomposed.")
    ] = OPSET,
    accept_accuracy_loss: Annotated[
        bool, typer.Option("--accept-accuracy-loss", help="Publish even if more than half a point of top-1 is lost.")
    ] = False,
    random: Annotated[bool, typer.Option("--random-weights", help="An untrained model, to measure speed.")] = False,
    preset: Annotated[str, typer.Option(help=f"With --random-weights: {', '.join(PRESETS)}.")] = "vit-s16",
    img_size: Annotated[int | None, typer.Option(help="With --random-weights; the preset's by default.")] = None,
    variant: Annotated[str, typer.Option(help="With --random-weights.")] = "csra-r2",
) -> None:
    """Publish a run as the next version of `<family>-<variant>`; random weights as `<preset>-<size>-random-<variant>`.

    Precisions other than fp32 add `-<precision>` to the name; their accuracy is measured on the full test split.
    int8-dynamic is for single images: it limits batches to one.

    Example: `stridevit export run runs/digits-csra-r2 --repository models`

    Example: `stridevit export run runs/digits-csra-r2 --precision int8 --repository models`

    Example: `stridevit export run --random-weights --preset vit-s16 --variant csra-r2 --repository /tmp/models`
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
    """Check a bundle from its files alone: digests, manifest, operators, shapes, kernels, golden outputs.

    Example: `stridevit export verify models/cifar100-csra-r2/5`
    """
    with _errors():
        findings = verify_bundle(bundle)
    for check, finding in findings.items():
        typer.echo(f"ok  {check:<9} {finding}")


@app.command(name="list")
def list_(repository: Annotated[Path, typer.Option(help="Folder of bundles.")] = Path("models")) -> None:
    """List all versions of all models in a repository; a broken one shows its error."""
    with _errors():
        Console().print(listing(repository))


@app.command()
def inspect(bundle: BundleArgument) -> None:
    """Show the facts about a bundle: variant, accuracy, size, operators, origin."""
    with _errors():
        Console().print(card(read_bundle(bundle)))


@app.command()
def diff(one: BundleArgument, other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another one.")]) -> None:
    """Show what differs between two bundles. Exit code 0 if nothing does, else 1, like diff."""
    with _errors():
        table = difference(read_bundle(one), read_bundle(other))
    if table.row_count:
        Console().print(table)
        raise typer.Exit(1)
    typer.echo("no difference")


@app.command()
def kernels(bundle: BundleArgument) -> None:
    """Check whether CUDA and TensorRT document a kernel for each node of a bundle. Exit code 1 if not.

    Example: `stridevit export kernels models/cifar100-csra-r2/5`
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
    preset: Annotated[str, typer.Option(help=f"Random weights: {', '.join(PRESETS)}.")] = "vit-s16",
    img_size: Annotated[int | None, typer.Option(help="Random weights: the preset's by default.")] = None,
    variants: Annotated[str, typer.Option(help="Random weights: ratios are to the first.")] = ",".join(REGISTERED),
    precisions: Annotated[str, typer.Option(help="Random weights: fp32, fp16, int8, int8-dynamic.")] = "fp32",
    opsets: Annotated[str, typer.Option(help=f"Random weights: {OPSETS[0]} to {OPSETS[-1]}.")] = str(OPSET),
    forms: Annotated[str, typer.Option(help="Random weights: shaped (served) or unshaped (torch's own).")] = "shaped",
    runtimes: Annotated[
        str, typer.Option(help="onnxruntime (served), openvino, openvino-bf16: to compare them on a CPU.")
    ] = "onnxruntime",
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="Measurements per model; fewer than 5 give no interval.")] = 10,
    seconds: Annotated[float, typer.Option(min=0.05, help="Duration of each measurement.")] = 2.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all available cores by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or tensorrt.")] = "auto",
    by_operator: Annotated[
        bool, typer.Option("--by-operator", help="Also time operators at the largest batch.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for profile.md, .json, .svg and .png.")] = None,
) -> None:
    """Throughput, latency and peak memory of the engine alone, models side by side in interleaved rounds.

    Lists are separated by commas; of random weights every combination is measured. Ctrl-C reports the complete rounds.
    Nothing else may use the GPU, because memory is the whole device's.

    Example: `stridevit export profile --preset vit-s16 --img-size 384 --batch 1,8 --out profile`

    Example: `stridevit export profile models/cifar100-mha/4 models/cifar100-mha-int8/2`

    Example: `stridevit export profile --precisions fp32,int8 --runtimes onnxruntime,openvino --batch 1 --threads 1`
    """
    _quieten_exporter()
    with _errors(), tempfile.TemporaryDirectory() as folder:
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", batch):
            raise ValueError(f"batch sizes {batch!r} are not whole numbers separated by commas, such as 1,8")
        engines: list[Runtime] = _listed(Runtime, runtimes)
        kind, number = resolve_device(device)
        if engines != ["onnxruntime"] and (by_operator or kind != "cpu"):
            raise ValueError("OpenVINO is measured on a CPU and without operators: use --device cpu, no --by-operator")
        setup = Setup(
            batches=tuple(map(int, batch.split(","))),
            rounds=rounds,
            seconds=seconds,
            threads=threads or available_cores(),
            device=f"cuda:{number}" if kind == "cuda" else kind,
        )
        with console.status("exporting random weights"):
            arms = [bundle_arm(path) for path in bundles or []] or list(
                random_arms(
                    Path(folder),
                    [architecture(preset, variant, img_size=img_size) for variant in variants.split(",")],
                    _listed(Precision, precisions),
                    list(map(int, opsets.split(","))),
                    _listed(Form, forms),
                )
            )
            arms = by_runtimes(arms, engines)
        traced = len(arms) * rounds if by_operator else 0
        minutes = estimated_seconds(arms, setup) * (1 + by_operator / len(setup.batches)) / 60
        console.print(f"about {minutes:.0f} minutes for {len(arms)} models")
        by_arm: dict[str, dict[str, float]] = {}
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("", total=len(arms) * len(setup.batches) * rounds + traced)

            def advance(what: str) -> None:
                progress.update(bar, description=what, advance=1)

            measured = measure(arms, setup, advance)
            written = profile_report.write(measured, out) if out else []
            if by_operator and measured.rounds == rounds:
                by_arm = operators(arms, setup, Path(folder), advance)
        Console().print(profile_report.table(measured))
        if by_arm:
            Console().print(profile_report.operator_table(by_arm))
        if written:
            console.print("wrote " + ", ".join(map(str, written)), soft_wrap=True)
    if measured.rounds < rounds:
        console.print(f"interrupted: {measured.rounds} of {rounds} rounds")
        raise typer.Exit(128 + signal.SIGINT)


def _listed(choices: Any, text: str) -> list[Any]:
    """The values in `text`, separated by commas. Raises ValueError for one that is not in the Literal `choices`."""
    for word in text.split(","):
        if word not in get_args(choices):
            raise ValueError(f"unknown {word!r}: choose from {', '.join(get_args(choices))}")
    return text.split(",")


def _quieten_exporter() -> None:
    """Silence progress reports and warnings: what matters is checked and raised as an error."""
    # onnxruntime.quantization warns on the root logger that the model was not pre-processed.
    for name in ("torch.onnx", "onnxscript", None):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch")


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Print an expected error in one line and exit with 1."""
    try:
        yield
    except (ExportError, RunError, DataError, BundleError, EngineError, ValueError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app(prog_name="python -m export")
