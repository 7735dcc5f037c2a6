"""What the commands share: options that mean the same everywhere, progress, and how they end."""

import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)

Repository = Annotated[Path, typer.Option(help="Folder of bundles.")]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Images to send: a folder of image files, of class folders, or of parquet files. [generated JPEGs]"
    ),
]
ServiceArgs = Annotated[str, typer.Option(help="Flags for the service, as one word: '--intra-op-threads 2'.")]
Command = Annotated[str | None, typer.Option(help="What the report says was run. [this command line]")]


def this_command() -> str:
    """As it can be given again."""
    return shlex.join(["python", "-m", "loadtests", *sys.argv[1:]])


def progress_bar() -> Progress:
    """What is done now, how much is done, how long it took and will take."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def end_as_if_interrupted() -> None:
    """A terminated measurement must take its servers along, as an interrupted one does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def fail(message: str) -> NoReturn:
    """Say what is wrong, and end with 1."""
    error(message)
    raise typer.Exit(1)


def error(message: str) -> None:
    """Say what is wrong."""
    console.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """Say what must be known."""
    console.print(f"[yellow]warning:[/] {escape(message)}", highlight=False, soft_wrap=True)
