"""`stridevit classify`: send images to a service; print the answers, or write them to a table."""

import errno
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import anyio
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stridevit.answers import StrideViTError
from stridevit.calls import DEFAULT_URL, LONGEST_DEADLINE_SECONDS
from stridevit.classify.many import Outcome, Source, Wishes, classify_all
from stridevit.classify.sources import named
from stridevit.classify.table import Table
from stridevit.client import AsyncClient

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
console = Console(stderr=True)

FAILED, INTERRUPTED = 1, 130


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
        float | None,
        typer.Option(
            min=0.001,
            max=1000 * LONGEST_DEADLINE_SECONDS,
            help="Deadline for each image, with all its tries; with --out, for each try.",
            show_default="the service's",
        ),
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
    at_once: Annotated[
        int, typer.Option(min=1, max=1000, help="Maximum concurrent requests; fewer while the service is busy.")
    ] = 64,
) -> None:
    """Classify images with a running service: single files, or a folder into a table.

    `stridevit classify photo.jpg` prints one line for each image. `stridevit classify photos/ --out results.csv` sends
    as many at once as the service takes, and writes each row as it is known. The same command continues where it was
    stopped and keeps all rows. A file that is not an image gets a row with its error: delete the row to try again.

    The key is read from the environment variable `STRIDEVIT_API_KEY`.

    Exit code: **0** each image was classified, now or in a row from before · **1** not all were, or the service is not
    there or rejects the call · **2** wrong arguments · **130** interrupted.
    """
    if as_json and out:
        raise typer.BadParameter("lines of JSON are printed: leave out --json or --out", param_hint="--json")
    sources = named(images)
    wishes = Wishes(
        model=model,
        deadline_ms=deadline_ms,
        whole=out is None,
        top_k=top_k,
        priority=priority or ("batch" if out else None),
    )
    try:
        client = AsyncClient(url, retries=0)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error  # it says whether the address or the key is wrong
    tally = _Tally()
    with ExitStack() as stack:
        lines = None
        if out:
            table = stack.enter_context(_table(out, wishes))
            tally.before = sum(source.name in table.done for source in sources)
            tally.failed_before = sum(source.name in table.failed for source in sources)
            sources = [source for source in sources if source.name not in table.done]
            write = table.add
        else:
            lines = _Lines(sources, as_json=as_json)
            write = lines.add
        code = _run(client, sources, wishes, at_once, lambda outcome: tally.add(outcome, write), lines)
    if (out or len(sources) > 1) and (tally.classified or code != FAILED):
        _say(f"{tally.text} in {out}" if out else tally.text)
    if out and (tally.failed or tally.failed_before):
        _say(f"to try images with an error again, delete their rows from {out} and give the same command")
    raise typer.Exit(code or (FAILED if tally.failed or tally.failed_before or tally.left else 0))


def _table(out: Path, wishes: Wishes) -> Table:
    try:
        return Table(out, model=wishes.model, top_k=wishes.top_k)
    except FileNotFoundError as error:
        reason = f"there is no folder {out.parent}: create it first"
        raise typer.BadParameter(reason, param_hint="--out") from error
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error


def _run(
    client: AsyncClient,
    sources: Sequence[Source],
    wishes: Wishes,
    at_once: int,
    report: Callable[[Outcome], None],
    lines: "_Lines | None",
) -> int:
    """Classify all, without `lines` into a table; returns the exit code as far as it does not depend on the images."""
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
            try:
                anyio.run(run)
            finally:
                if lines:
                    lines.finish()
        except StrideViTError as error:
            console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            return FAILED
        except BrokenPipeError:  # `| head` has enough; typer ends quietly
            raise
        except OSError as error:
            fix = "" if lines else ". Once that is fixed, run the same command to resume"
            if error.errno in (errno.EMFILE, errno.ENFILE):
                fix = ". Raise the limit with ulimit -n, or lower --at-once"
            console.print(f"[red]error:[/] {escape(str(error))}{fix}", highlight=False, soft_wrap=True)
            return FAILED
        except KeyboardInterrupt:
            _say("interrupted" if lines else "interrupted: run the same command to resume")
            return INTERRUPTED
    return 0


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


class _Tally:
    """Counts the images by their outcome."""

    def __init__(self) -> None:
        self.classified = self.failed = self.left = 0
        self.before = self.failed_before = 0
        """Images that the table had, and those of them with an error."""

    def add(self, outcome: Outcome, write: Callable[[Outcome], None]) -> None:
        """Write an image if it is done, and count it."""
        write(outcome)
        if outcome.problem is None:
            self.classified += 1
        elif outcome.final:
            self.failed += 1
        else:
            self.left += 1

    @property
    def text(self) -> str:
        """The counts, in words."""
        left = f", {self.left} missed the deadline" if self.left else ""
        before = f", {self.before} from before" if self.before else ""
        failed = f", {self.failed_before} of them with an error" if self.failed_before else ""
        return f"{self.classified} classified, {self.failed} with an error{left}{before}{failed}"


class _Lines:
    """Prints outcomes in the order of the images."""

    def __init__(self, sources: Sequence[Source], *, as_json: bool) -> None:
        self._sources, self._order, self._as_json = sources, iter(sources), as_json
        self._next = next(self._order, None)
        self._waiting: dict[Source, Outcome] = {}

    def add(self, outcome: Outcome) -> None:
        """Print an outcome, or keep it until those before it are there."""
        self._waiting[outcome.source] = outcome
        while self._next and (ready := self._waiting.pop(self._next, None)):
            self._print(ready)
            self._next = next(self._order, None)

    def finish(self) -> None:
        """Print what waits for images that a run left without an outcome."""
        for source in self._sources:
            if ready := self._waiting.pop(source, None):
                self._print(ready)

    def _print(self, outcome: Outcome) -> None:
        text = _as_json(outcome) if self._as_json else _as_text(outcome)
        typer.echo(text, err=outcome.answer is None and not self._as_json)


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


if __name__ == "__main__":
    app(prog_name="python -m stridevit.classify")
