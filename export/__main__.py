"""`python -m export`: publish finished runs as bundles, prove bundles again, and show what they are."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from export.bundles import export_random, export_run
from export.cards import card, difference, listing
from export.graph import ExportError
from export.verify import verify as verify_bundle
from service.bundle import MODEL_FILE, read_bundle
from service.errors import BundleError, EngineError
from training.models import PRESETS, architecture
from training.readers import DataError
from training.runs import RunError

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
            help="The data set, as in training: its test images prove the export. Not needed for `digits`.",
        ),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Models that may stand in for each other. [the data set's name]")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Instead of a run: untrained, to measure speed and memory.")
    ] = False,
    preset: Annotated[str, typer.Option(help=f"With --random-weights: {', '.join(PRESETS)}.")] = "vit-s16",
    image_size: Annotated[int | None, typer.Option(help="With --random-weights; the preset's by default.")] = None,
    variant: Annotated[str, typer.Option(help="With --random-weights.")] = "csra-r2",
) -> None:
    """Publish a run as the next version of `<family>-<variant>`; random weights as `<preset>-<size>-random-<variant>`.

    Example: `python -m export run runs/digits-csra-r2 --repository models`

    Example: `python -m export run --random-weights --preset vit-s16 --variant csra-r2 --repository /tmp/models`
    """
    if (folder is None) != random_weights:
        raise typer.BadParameter("name a RUN, or give --random-weights, and not both")
    # The exporter reports its own progress at length; what matters is checked and raised as an error.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch")
    with _errors(), console.status(f"exporting {folder or variant}"):
        if folder is None:
            spec = architecture(preset, variant, image_size=image_size)
            published = export_random(spec, repository)
        else:
            published = export_run(folder, repository, data=data, family=family)
    manifest = read_bundle(published).manifest
    size = (published / MODEL_FILE).stat().st_size
    typer.echo(
        f"{published}: {manifest.variant}, {manifest.kv_tokens} of {manifest.tokens} K/V tokens, "
        f"{manifest.parameters:,} parameters, {size / 1e6:.1f} MB, "
        f"largest difference from torch {manifest.parity.max_abs_logit:g} in a logit on {manifest.parity.images} images"
    )


BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of one version, such as models/x/1.")]


@app.command()
def verify(bundle: BundleArgument) -> None:
    """Prove a bundle again from its files alone: digests, manifest, operators, shapes, golden outputs.

    Example: `python -m export verify models/cifar100-csra-r2/2`
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
