"""One command for all packages. A package is imported only when one of its commands runs, so `serve` needs no torch."""

import importlib
import importlib.metadata
import os
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from stridevit.collisions import DISTRIBUTION, PACKAGES, collision

console = Console(stderr=True)

_EXTRAS: Final = {
    "training": "train",
    "export": "export",
    "service": "cpu",
    "loadtests": "loadtest",
    "stridevit.classify": "cpu",
}
"""The optional dependencies that a package's commands need, as pyproject.toml names them."""

_PRODUCTS: Final = {"torch": "PyTorch", "onnx": "ONNX", "onnxscript": "ONNX Script", "locust": "Locust"}
"""What a missing module is called, if not by its own name."""


class PackageCommand(TyperCommand):
    """Stands in the help for a command of a package; `load` imports the package and returns the command itself."""

    def __init__(self, name: str, form: str, help: str, *, panel: str) -> None:  # noqa: A002 (the parent's name)
        super().__init__(name, short_help=help, rich_markup_mode="markdown", rich_help_panel=panel)
        self.package, _, self.command = form.partition(" ")

    def load(self) -> Any:
        """Import the package. Raises ModuleNotFoundError."""
        group = typer.main.get_group(importlib.import_module(f"{self.package}.__main__").app)
        loaded: Any = group
        if self.command:
            loaded = group.commands[self.command]
        elif group.invoke_without_command:
            # What the package does when no command is named: the service serves.
            loaded = TyperCommand(
                self.name,
                callback=group.callback,
                params=group.params,
                help=group.help,
                rich_markup_mode=group.rich_markup_mode,
            )
        else:
            for own in COMMANDS.values():  # one path for each command
                if own.package == self.package and own.command:
                    group.commands.pop(own.command, None)
            group.name = self.name
        return loaded


_TABLE: Final = {
    "Try": (
        (
            "demo",
            "stridevit.demo demo",
            "Train variants on digits or on your pictures, export them, serve them and compare them under load.",
        ),
        (
            "classify",
            "stridevit.classify classify",
            "Classify images with a running service: single files, or a folder into a table.",
        ),
    ),
    "Train": (
        (
            "train",
            "training train",
            "Train one variant. The finished model is in the folder's `final/`, for `evaluate` and for export.",
        ),
        (
            "study",
            "training study",
            "Train several variants with several seeds; write a table of means ± standard deviations and learning "
            "curves.",
        ),
        (
            "retrofit",
            "training retrofit",
            "Turn a trained MHA model into a compressed variant: fit its keys and values, then distil for a few "
            "epochs.",
        ),
        ("evaluate", "training evaluate", "Top-1 and top-5 of a finished run on the full test split of its data set."),
        (
            "describe",
            "training describe",
            "Costs of each variant of a preset for one image: parameters, multiply-accumulates, attention memory.",
        ),
        (
            "profile",
            "training profile",
            "Training throughput on random images, and the operators that take the time: to choose precision and "
            "batch size.",
        ),
        (
            "images",
            "training images",
            "Write test images as PNG files with a labels.csv, to classify with a service or to load-test it with.",
        ),
    ),
    "Export": (
        (
            "export",
            "export",
            "Export trained models to bundles: plain ONNX with uint8 input, built-in normalisation and a dynamic "
            "batch, compared with the original on real images before anything is published.",
        ),
    ),
    "Serve": (
        ("serve", "service", "Serve image classification models over HTTP."),
        (
            "check",
            "service check",
            "Load and verify every model that would be served, without serving: digests, golden outputs, device.",
        ),
        (
            "engine-limit",
            "service engine-limit",
            "Measure decoding and the engine together without HTTP: the most that this machine can serve.",
        ),
        ("key", "service key", "Generate an API key, and its hash for the service."),
        (
            "settings",
            "service settings",
            "Show the settings in effect and the origin of each value. Hashes of keys are hidden.",
        ),
    ),
    "Load-test": (
        (
            "compare",
            "loadtests compare",
            "Compare models, precisions, servers or commits: speed, latency, memory and accuracy, with intervals.",
        ),
        (
            "loadtest",
            "loadtests",
            "Find out which model to run, at which load, and at what cost in accuracy and memory.",
        ),
    ),
}
"""Name, module and command for `python -m`, and the first paragraph of the command's own help: a test compares them."""

COMMANDS: Final = {
    name: PackageCommand(name, form, text, panel=panel) for panel, rows in _TABLE.items() for name, form, text in rows
}


class Commands(TyperGroup):
    """The group of all commands. The help comes from `COMMANDS` alone; only a command that is called is loaded."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "commands": dict(COMMANDS)})

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command that `args` begin with, and import its package. Exits with 1 if that is impossible."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load(command) if isinstance(command, PackageCommand) else command, rest


def _load(command: PackageCommand) -> Any:
    if problem := collision():
        _fail(problem)
    try:
        return command.load()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == command.package:
            _fail(f"stridevit {command.name} is not part of this installation: it has no package '{missing}'")
        if missing in (*PACKAGES, ""):
            raise
        extra = f"pip install '{DISTRIBUTION}[{_EXTRAS[command.package]}]'"
        _fail(f"stridevit {command.name} needs {_PRODUCTS.get(missing, missing)}: {extra}")


def _fail(message: str) -> None:
    console.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}")
        raise typer.Exit


app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)


@app.callback()
def stridevit(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Vision Transformers with compressed keys and values: train, export, serve and compare them under load.

    Each part of the work is optional: `pip install 'stridevit[cpu]'` serves, `[train]`, `[export]` and `[loadtest]` add
    the other commands. `stridevit COMMAND --help` is the manual of a command.
    """


def main() -> None:
    """The installed script."""
    # A script does not import from the current folder; with this, the Python processes that it starts do not either.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    app(prog_name="stridevit")
