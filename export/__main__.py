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

import onnxruntime
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from export import profile_report
from export.descriptions import card, difference, kernel_table, listing, summary
from export.foreign import Meaning, onnx_source
from export.graph import OPSET, OPSETS, ExportError
from export.labels import read_labels
from export.preprocessing import Interpolation, chosen_preprocessing
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
from export.timm_models import timm_source
from export.verify import read_graph
from export.verify import verify as verify_bundle
from service.bundle import read_bundle
from service.engine import resolve_device
from service.errors import BundleError, EngineError
from service.host import available_cores
from service.manifest import Precision
from service.remote.web_index import INDEX_FILE, write_index
from training.initial import SourceError
from training.models import PRESETS, architecture
from training.readers import DataError
from training.runs import RunError
from training.variants import REGISTERED

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Export trained models to bundles: plain ONNX with uint8 input, built-in normalisation and a dynamic batch,
    compared with the original on real images before anything is published.

    `run` takes a run of `train` or `retrofit`, `timm` a timm model, `onnx` any other image classifier.""",
)
console = Console(stderr=True)


RepositoryOption = Annotated[Path, typer.Option(help="Folder of bundles to publish into.")]
NameOption = Annotated[
    str | None, typer.Option(help="Name of the model within its family. [default: see above]", show_default=False)
]
PrecisionOption = Annotated[Precision, typer.Option(help="fp16 for GPUs; int8 and int8-dynamic for CPUs.")]
OpsetOption = Annotated[
    int, typer.Option(min=OPSETS[0], max=OPSETS[-1], help=f"Below {OPSET} attention is decomposed.")
]
AcceptOption = Annotated[
    bool, typer.Option("--accept-accuracy-loss", help="Publish even if more than half a point of top-1 is lost.")
]
LabelsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Names of the classes, one per line, in the order of the outputs.")
]
PicturesOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DIR|hub:OWNER/NAME",
        help="Pictures in class folders named after the labels, or another data set: to verify the export, to measure "
        "accuracy, to calibrate int8.",
    ),
]


@app.command()
def run(
    repository: RepositoryOption,
    folder: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Folder of a finished run.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            envvar="STRIDEVIT_DATA",
            metavar="DIR|hub:OWNER/NAME",
            help="Data set, as in training; none for digits. Test images verify the export, others calibrate int8.",
        ),
    ] = None,
    family: Annotated[str | None, typer.Option(help="Family of the model; the data set's name by default.")] = None,
    name: NameOption = None,
    precision: PrecisionOption = "fp32",
    opset: OpsetOption = OPSET,
    accept_accuracy_loss: AcceptOption = False,
    random: Annotated[bool, typer.Option("--random-weights", help="An untrained model, to measure speed.")] = False,
    preset: Annotated[str, typer.Option(help=f"With --random-weights: {', '.join(PRESETS)}.")] = "vit-s16",
    img_size: Annotated[int | None, typer.Option(help="With --random-weights; the preset's by default.")] = None,
    variant: Annotated[str, typer.Option(help="With --random-weights.")] = "csra-r2",
) -> None:
    """Publish a run as the next version of `<family>-<variant>`; random weights as `<preset>-<size>-random-<variant>`.

    `--name` replaces the variant in the name, for models of several sizes in one family: a name never changes its
    architecture. Precisions other than fp32 add `-<precision>` to the name; their accuracy is measured on the full test
    split. int8-dynamic is for single images: it limits batches to one.

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
            name=name,
            precision=precision,
            opset=opset,
            accept_accuracy_loss=accept_accuracy_loss,
        )
    typer.echo(summary(read_bundle(published)))


@app.command(name="timm")
def timm_(
    model: Annotated[str, typer.Argument(metavar="NAME", help="Name in timm, such as vit_small_patch16_224.")],
    repository: RepositoryOption,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE.safetensors", help="Weights to use instead of those on the hub."),
    ] = None,
    labels: LabelsOption = None,
    data: PicturesOption = None,
    family: Annotated[str | None, typer.Option(help="`imagenet` by default; with --labels, the model's name.")] = None,
    name: NameOption = None,
    precision: PrecisionOption = "fp32",
    opset: OpsetOption = OPSET,
    accept_accuracy_loss: AcceptOption = False,
    random: Annotated[bool, typer.Option("--random-weights", help="Untrained, to measure speed.")] = False,
) -> None:
    """Publish a timm classifier as the next version of `<family>-<NAME>`: your present model as a baseline.

    Preprocessing and, for ImageNet models, labels are timm's. A plain Vision Transformer is rewritten for inference
    like our `mha`, so that `compare` compares attention and not exporters; any other model is exported as it is in
    timm. Weights are read from safetensors files only.

    Example: `stridevit export timm vit_small_patch16_224.augreg_in1k --repository models`

    Example: `stridevit export timm resnet18 --weights mine.safetensors --labels labels.txt --data photos/ --family
    photos --repository models`
    """
    _quieten_exporter()
    with _errors(), console.status(f"exporting timm:{model} as {precision}"):
        if random and weights:
            raise ValueError("--weights and --random-weights exclude each other")
        source = timm_source(
            model,
            weights=weights,
            labels=read_labels(labels) if labels else (),
            data=data,
            family=family,
            random=random,
        )
        published = export(
            source,
            repository,
            name=name,
            precision=precision,
            opset=opset,
            accept_accuracy_loss=accept_accuracy_loss,
        )
    typer.echo(summary(read_bundle(published)))


@app.command(name="onnx")
def onnx_(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="One input of images, one output of classes.")],
    repository: RepositoryOption,
    labels: Annotated[
        Path, typer.Option(metavar="FILE", help="Names of the classes, one per line, in the order of the outputs.")
    ],
    family: Annotated[str, typer.Option(help="Family of the model; models of a family have the same labels.")],
    preprocessing: Annotated[
        str | None, typer.Option(metavar="timm:NAME", help="As timm does for this model; or use the options below.")
    ] = None,
    resize: Annotated[int | None, typer.Option(min=1, help="Shorter side before the crop. [default: --crop]")] = None,
    crop: Annotated[int | None, typer.Option(min=1, help="Side of the input. [default: the graph's]")] = None,
    interpolation: Annotated[Interpolation, typer.Option(help="bicubic or bilinear.")] = "bicubic",
    mean: Annotated[str | None, typer.Option(metavar="R,G,B", help="To subtract, in units of the 0..1 range.")] = None,
    std: Annotated[str | None, typer.Option(metavar="R,G,B", help="To divide by, in units of the 0..1 range.")] = None,
    outputs: Annotated[
        Meaning, typer.Option(help="logits, probabilities, or auto, which is decided from their values.")
    ] = "auto",
    output: Annotated[str | None, typer.Option(help="Name of the output, where the graph has several.")] = None,
    data: PicturesOption = None,
    name: NameOption = None,
    precision: PrecisionOption = "fp32",
    accept_accuracy_loss: AcceptOption = False,
) -> None:
    """Publish any image classifier in ONNX as the next version of `<family>-<FILE>`.

    The graph is embedded unchanged in one of ours, which takes uint8 images, normalises them and returns logits and
    probabilities. Older opsets are converted, and external data is embedded. If batches give other outputs than single
    images, images are taken one at a time. The result is compared with the file itself in ONNX Runtime.

    Example: `stridevit export onnx mobilenet.onnx --labels imagenet.txt --family imagenet --preprocessing
    timm:mobilenetv3_small_100 --repository models`

    Example: `stridevit export onnx mine.onnx --labels labels.txt --family photos --resize 256 --mean 0.485,0.456,0.406
    --std 0.229,0.224,0.225 --data photos/ --repository models`
    """
    _quieten_exporter()
    with _errors(), console.status(f"exporting {file} as {precision}"):
        source = onnx_source(
            file,
            chosen_preprocessing(
                preprocessing, resize=resize, crop=crop, interpolation=interpolation, mean=mean, std=std
            ),
            crop=crop,
            labels=read_labels(labels),
            family=family,
            meaning=outputs,
            output=output,
            data=data,
        )
        published = export(
            source, repository, name=name, precision=precision, accept_accuracy_loss=accept_accuracy_loss
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
def index(repository: Annotated[Path, typer.Option(help="Folder of bundles.")] = Path("models")) -> None:
    """Write `index.json`, from which a service finds the bundles of a repository on a web server.

    Upload it after the bundles that it lists, and write it again after every change: a version without an entry is not
    served. `stridevit serve --repository https://HOST/FOLDER` reads it.

    Example: `stridevit export index --repository models`
    """
    with _errors():
        versions = write_index(repository)
    typer.echo(f"wrote {repository / INDEX_FILE}: {versions} versions")


@app.command()
def inspect(bundle: BundleArgument) -> None:
    """Show the facts about a bundle: variant, accuracy, size, operators, origin."""
    with _errors():
        Console().print(card(read_bundle(bundle)))


@app.command()
def diff(one: BundleArgument, other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another bundle.")]) -> None:
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

    Lists are separated by commas; with random weights, every combination is measured. Ctrl-C reports the complete
    rounds. Nothing else may use the GPU, because memory is measured for the whole device.

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
    # Fatal errors only: a graph may fail in batches, which is then reported in our own words.
    onnxruntime.set_default_logger_severity(4)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Print an expected error in one line and exit with 1."""
    try:
        yield
    except (ExportError, SourceError, RunError, DataError, BundleError, EngineError, OSError, ValueError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app(prog_name="python -m export")
