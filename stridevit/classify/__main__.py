"""`stridevit classify`: send images to a service; print the answers, or write them to a table."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Final, Literal

import anyio
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stridevit.answers import StrideViTError
from stridevit.calls import DEFAULT_URL
from stridevit.classify.many import Outcome, Source, Wishes, classify_all
from stridevit.classify.table import Table
from stridevit.client import AsyncClient

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
console = Console(stderr=True)

FAILED, INTERRUPTED = 1, 130
SUFFIXES: Final = frozenset(
    {".avif", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
"""Suffixes of the files in a folder that are sent."""


@app.callback()
def stridevit_classify() -> None:
    """Images on this machine, models on another."""


@app.command()
def classify(
    images: Annotated[
        list[str],
        typer.Argument(help="Files, folders (with all below them), and `-` for standard input.", metavar="IMAGES"),
    ],
    url: Annotated[str, typer.Option(help="Address of the service.")] = DEFAULT_URL,
    model: Annotated[
        str | None,
        typer.Option(
            help="A model, or a family: its most accurate model in time answers.", show_default="the service's"
        ),
    ] = None,
    deadline_ms: Annotated[
        float | None, typer.Option(min=0.001, help="Deadline for each answer.", show_default="the service's")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Classes for each image, best first.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write a CSV table, or continue it.", show_default="print lines")
    ] = None,
    priority: Annotated[
        Literal["interactive", "batch"] | None,
        typer.Option(help="`batch` lets other requests go first.", show_default="batch with --out, else interactive"),
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, max=1000, help="Most requests at once; fewer while it is busy.")] = 64,
) -> None:
    """Classify images with a service that runs: a few, or a folder into a table.

    `stridevit classify photo.jpg` prints one line for each image. `stridevit classify photos/ --out results.csv` sends
    as many at once as the service takes, and writes each row as it is known. The same command continues where it was
    stopped and keeps all rows. A file that is not an image gets a row with its error: delete it to try again.

    The key is read from the environment variable `STRIDEVIT_API_KEY`.

    Exit code: **0** each image was classified · **1** not all were, or the service is not there or rejects the call ·
    **2** wrong arguments · **130** interrupted.
    """
    if as_json and out:
        raise typer.BadParameter("lines of JSON are printed: leave out --json or --out", param_hint="--json")
    sources = _sources(images)
    wishes = Wishes(model, deadline_ms, top_k, priority or ("batch" if out else None))
    try:
        client = AsyncClient(url, retries=0)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url") from error
    with ExitStack() as stack:
        table = None
        if out:
            try:
                table = stack.enter_context(Table(out, top_k=top_k))
            except (OSError, ValueError) as error:
                raise typer.BadParameter(str(error), param_hint="--out") from error
            sources = [source for source in sources if source.name not in table.done]
        tally = _Tally()
        write = table.add if table else _Lines(sources, as_json=as_json).add
        code = _run(client, sources, wishes, at_once, lambda outcome: tally.add(outcome, write))
    if (out or len(sources) > 1) and (tally.classified or code != FAILED):
        where = f" in {out}" if out else ""
        before = f", {len(table.done)} from before" if table and table.done else ""
        console.print(f"{tally.text}{before}{where}", highlight=False, soft_wrap=True, markup=False)
    raise typer.Exit(code or (FAILED if tally.failed or tally.left else 0))


def _run(
    client: AsyncClient, sources: Sequence[Source], wishes: Wishes, at_once: int, report: Callable[[Outcome], None]
) -> int:
    """Classify all; returns the exit code as far as it does not depend on the images."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = len(sources) < 2 or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("classifying", total=len(sources))

        def reported(outcome: Outcome) -> None:
            report(outcome)
            progress.advance(task)

        async def run() -> None:
            async with client:
                await classify_all(client, sources, wishes, most=at_once, report=reported)

        try:
            anyio.run(run)
        except StrideViTError as error:
            console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            return FAILED
        except KeyboardInterrupt:
            console.print("interrupted: the same command goes on from here", highlight=False)
            return INTERRUPTED
    return 0


class _Tally:
    """Counts the images by their outcome."""

    def __init__(self) -> None:
        self.classified = self.failed = self.left = 0

    def add(self, outcome: Outcome, write: Callable[[Outcome], None]) -> None:
        """Count an image, and write it if it is done."""
        if outcome.problem is None:
            self.classified += 1
        elif outcome.final:
            self.failed += 1
        else:
            self.left += 1
        write(outcome)

    @property
    def text(self) -> str:
        """The counts, in words."""
        left = f", {self.left} not in time" if self.left else ""
        return f"{self.classified} classified, {self.failed} with an error{left}"


class _Lines:
    """Prints outcomes in the order of the images."""

    def __init__(self, sources: Sequence[Source], *, as_json: bool) -> None:
        self._order, self._as_json = iter(sources), as_json
        self._next = next(self._order, None)
        self._waiting: dict[Source, Outcome] = {}

    def add(self, outcome: Outcome) -> None:
        """Print an outcome, or keep it until those before it are there."""
        self._waiting[outcome.source] = outcome
        while self._next and (ready := self._waiting.pop(self._next, None)):
            text = _as_json(ready) if self._as_json else _as_text(ready)
            typer.echo(text, err=ready.answer is None and not self._as_json)
            self._next = next(self._order, None)


def _as_text(outcome: Outcome) -> str:
    name, answer = outcome.source.name, outcome.answer
    if answer is None:
        return f"{name}: error: {outcome.problem.detail if outcome.problem else ''}"
    best = ", ".join(f"{found.label} {found.probability:.3f}" for found in answer.predictions)
    why = f", {answer.choice.reason}" if answer.choice else ""
    return f"{name}: {best}  ({answer.model}{why}, {answer.timings_ms['total']:.1f} ms)"


def _as_json(outcome: Outcome) -> str:
    members: dict[str, object] = {"image": outcome.source.name}
    if outcome.problem:
        members["error"] = outcome.problem.model_dump(exclude_none=True)
    elif outcome.answer:
        members |= outcome.answer.model_dump(exclude={"results"})
        members["predictions"] = [best.model_dump() for best in outcome.answer.predictions]
    return json.dumps(members, ensure_ascii=False)


def _sources(arguments: Sequence[str]) -> list[Source]:
    """The images that the arguments name, each once and in order. Raises BadParameter."""
    found: dict[str, Source] = {}
    for argument in arguments:
        path = Path(argument)
        if argument == "-":
            found[argument] = Source(argument, sys.stdin.buffer.read())
        elif path.is_dir():
            before = len(found)
            found |= {_shown(file): Source(_shown(file), file) for file in _images_in(path)}
            if len(found) == before:
                raise typer.BadParameter(f"no images in {path}: their names end with {', '.join(sorted(SUFFIXES))}")
        elif path.exists():
            found[_shown(path)] = Source(_shown(path), path)
        else:
            raise typer.BadParameter(f"there is no {path}")
    return list(found.values())


def _images_in(folder: Path) -> Iterator[Path]:
    """Image files in a folder and below, in order; not those that are hidden."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(parent, name)


def _shown(path: Path) -> str:
    """A path as one line of text, whatever characters it has."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in str(path)
    )


if __name__ == "__main__":
    app(prog_name="python -m stridevit.classify")
