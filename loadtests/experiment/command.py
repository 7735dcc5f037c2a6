"""What the commands share: options that mean the same everywhere, progress, interruption, exit codes, the report.

A command turns its flags into a plan, passes `run_measurement` the functions that measure and report, and exits with
the code that it returns.
"""

import signal
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich import progress as rich_progress
from rich.console import Console
from rich.markup import escape

from loadtests.errors import LoadTestError
from loadtests.experiment.model import Arm, Load, Measurement, Progress
from loadtests.experiment.run import Bench
from loadtests.experiment.store import Store

console = Console(stderr=True)

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""

Repository = Annotated[Path, typer.Option(help="Folder of model bundles.")]
Url = Annotated[str | None, typer.Option(help="Instead, a server that already runs, such as http://127.0.0.1:8000.")]
Data = Annotated[
    Path | None,
    typer.Option(help="Images to send: a folder of image files, class folders, or parquet files. [generated JPEGs]"),
]
Out = Annotated[Path, typer.Option(help="Folder for the reports, results.json and the servers' logs.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds; each holds one block of every arm, interleaved.")]
Seconds = Annotated[float, typer.Option(min=1, help="Measured seconds of each load.")]
Warmup = Annotated[float, typer.Option(min=0, help="Seconds dropped at the start of each load.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard what an interrupted run has left in --out.")]
ServiceArgs = Annotated[str, typer.Option(help="Flags for the service, as one string: '--intra-op-threads 2'.")]
Command = Annotated[str | None, typer.Option(help="The command to quote in the report. [this command line]")]


def run_rounds(
    bench: Bench,
    loads: Callable[[Arm], Sequence[Load]],
    *,
    fresh: bool,
    report: Callable[[], Path],
    stop: Callable[[int], str | None] = lambda _: None,
) -> NoReturn:
    """Measure a plan that is fixed from the start, report, and exit, also with 1 if a block failed.

    `stop` as in `Bench.rounds`.
    """

    def measure(progress: Progress) -> None:
        with bench.opened(progress, fresh=fresh):
            bench.rounds(loads, progress, stop=stop)

    code = run_measurement(bench.experiment, measure, report=report, store=bench.store)
    raise typer.Exit(code or int(bool(bench.experiment.failures)))


def run_measurement(
    results: Measurement,
    measure: Callable[[Progress], None],
    *,
    report: Callable[[], Path],
    store: Store | None = None,
) -> int:
    """Measure, then report what there is, even after an interruption or an error; returns the exit code.

    0 if the measurement finished, 1 after a LoadTestError, 130 after Ctrl-C or SIGTERM. `report` writes the report and
    returns its path; it is called only if `results.measured`. Sets `results.ended_early` and `results.finished`. A
    `store` is kept to resume what did not finish, and otherwise cleared.
    """
    # A terminated measurement must stop its servers and report, just as an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 0
    try:
        with _ProgressBar() as progress:
            measure(progress)
        results.finished = datetime.now(UTC)
    except LoadTestError as problem:
        code, results.ended_early = 1, str(problem).splitlines()[0].rstrip(":")
        error(str(problem))
    except KeyboardInterrupt:
        code, results.ended_early = INTERRUPTED, "interrupted"
        console.print("\nstopped; no server of this measurement is left running", highlight=False)
    if results.measured:
        if code and store and store.holds_blocks():
            console.print("The same command resumes the measurement. Measured so far:")
        typer.echo(f"report: {report()}")
        if store and results.ended_early is None:
            store.clear()
    elif code == INTERRUPTED:
        console.print("Nothing was measured yet, so there is no report.")
    return code


def repository_unless(url: str | None, repository: Path | None, service_args: str) -> Path:
    """The repository to serve; exits with an error if `--url` comes with the flags of a server that is started."""
    if url is not None and (repository is not None or service_args):
        fail("--url names a server that runs already: --repository and --service-args are for one that is started")
    return repository or Path("models")


def names(text: str) -> tuple[str, ...]:
    """The words of a list separated by commas, without repetitions."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def fail(message: str) -> NoReturn:
    """Print an error, and exit with 1."""
    error(message)
    raise typer.Exit(1)


def error(message: str) -> None:
    """Print an error."""
    console.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning."""
    console.print(f"[yellow]warning:[/] {escape(message)}", highlight=False, soft_wrap=True)


class _ProgressBar(rich_progress.Progress):
    """A progress bar on standard error."""

    def __init__(self) -> None:
        text, bar, count = rich_progress.TextColumn, rich_progress.BarColumn(), rich_progress.MofNCompleteColumn()
        elapsed, left = rich_progress.TimeElapsedColumn(), rich_progress.TimeRemainingColumn()
        super().__init__(text("{task.description}"), bar, count, elapsed, text("left"), left, console=console)
        self._task = self.add_task("starting", total=None)

    def step(self, what: str, done: float, total: float) -> None:
        self.update(self._task, description=what, completed=done, total=total)

    def note(self, message: str) -> None:
        self.console.print(escape(message), highlight=False, soft_wrap=True)
