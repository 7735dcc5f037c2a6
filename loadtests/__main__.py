"""`python -m loadtests`: compare models under load."""

import signal
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loadtests import report
from loadtests.compare import Plan
from loadtests.compare import compare as run_comparison
from loadtests.payloads import PayloadError
from loadtests.server import ServerError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Find out which model to run, at which load, at what cost in accuracy and memory.""",
)
console = Console(stderr=True)

_START_STOP_SECONDS = 8
"""What a block costs beside its load, for the estimate."""


@app.callback()
def _subcommands() -> None:
    """Keep `compare` a subcommand although it is the only one."""


@app.command()
def compare(
    repository: Annotated[Path, typer.Option(help="Folder of bundles.")],
    models: Annotated[str, typer.Option(help="Names separated by commas.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, results.json and server logs.")] = Path(
        "results/compare"
    ),
    data: Annotated[
        Path | None,
        typer.Option(help="Images to send: a folder of image files, or of parquet files. [generated JPEGs]"),
    ] = None,
    users: Annotated[int, typer.Option(min=1, help="Users, each waiting for its answer (closed loop).")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="Measured seconds a block.")] = 10.0,
    warmup: Annotated[float, typer.Option(min=0, help="Seconds dropped at the start of a block.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks a model, interleaved.")] = 4,
) -> None:
    """Serve each model in a process of its own, drive it with Locust, and report speed, memory and accuracy together.

    Example: `python -m loadtests compare --repository models --models cifar100-mha,cifar100-csra-r2 --data photos`
    """
    names = tuple(dict.fromkeys(name.strip() for name in models.split(",") if name.strip()))
    if not names:
        _fail("--models names no model: separate names with commas")
    plan = Plan(
        repository=repository,
        models=names,
        data=data,
        users=users,
        seconds=seconds,
        warmup_seconds=warmup,
        rounds=rounds,
    )
    estimate = len(names) * rounds * (seconds + warmup + _START_STOP_SECONDS)
    console.print(f"{len(names) * rounds} blocks, about {estimate / 60:.1f} minutes")
    # A terminated comparison must take its servers along, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    try:
        with progress:
            bar = progress.add_task("starting", total=len(names) * rounds)
            comparison = run_comparison(
                plan,
                out,
                on_block=lambda model, done, _: progress.update(bar, description=model, completed=done),
            )
            progress.update(bar, completed=len(names) * rounds)
    except (PayloadError, ServerError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        console.print("\nstopped; the services of this comparison are gone, and nothing was written but their logs")
        raise typer.Exit(130) from None
    report.write_json(comparison, out / "results.json")
    report.write_html(comparison, out / "report.html")
    Console(width=max(140, Console().width)).print(report.table(comparison))
    typer.echo(f"report: {out / 'report.html'}")


def _fail(message: str) -> NoReturn:
    console.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m loadtests")
