"""The command `accuracy`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loadtests.accuracy import report as accuracy_report
from loadtests.accuracy.figures import figures
from loadtests.accuracy.survey import AccuracyError, Plan, Survey, survey
from loadtests.experiment.command import (
    Command,
    ServiceArgs,
    console,
    end_as_if_interrupted,
    fail,
    progress_bar,
    this_command,
    warn,
)
from loadtests.experiment.environment import environment
from loadtests.experiment.server import ServerError
from loadtests.generator.payloads import PayloadError


def accuracy(
    model: Annotated[str, typer.Option(help="Name; its newest version is asked.")],
    data: Annotated[
        Path,
        typer.Option(
            help="Labelled images: a folder of parquet files (its test split), of class folders, or of image files "
            "with a labels.csv (columns file, and index or label)."
        ),
    ],
    repository: Annotated[
        Path | None, typer.Option(help="Folder of bundles, served in a fresh process. [models]", show_default=False)
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Instead: a server that runs already, such as http://127.0.0.1:8000.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another model of the same server, asked about the same images.")
    ] = None,
    most: Annotated[int | None, typer.Option(min=1, help="Only so many images, from the first. [all]")] = None,
    connections: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")] = 8,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            help="Percentage points of top-1 that the served model may be off its manifest, on the manifest's images.",
        ),
    ] = 0.1,
    out: Annotated[
        Path, typer.Option(help="Folder for report.md, results.json, disagreements.csv and the server's log.")
    ] = Path("results/accuracy"),
    service_args: ServiceArgs = "",
    command: Command = None,
) -> None:
    """Ask a served model about a whole labelled set, and report top-1 and top-5 as a client sees them.

    Compared with what the model's manifest states, and, with `--against`, with another model image by image. A request
    that fails counts as wrong. Exit code 1 if any request failed, or if a model misses its manifest's accuracy on the
    same images.

    Example: `python -m loadtests accuracy --model cifar100-csra-r2 --against cifar100-mha --data cifar100`
    """
    if url is not None and (repository is not None or service_args):
        fail("--url names a server that runs already: --repository and --service-args are for one of our own")
    if against == model:
        fail(f"--against {against} is the model itself")
    plan = Plan(
        models=(model,) if against is None else (model, against),
        data=data,
        url=url,
        repository=repository or Path("models"),
        most=most,
        connections=connections,
        service_arguments=tuple(shlex.split(service_args)),
    )
    end_as_if_interrupted()
    about = {"command": command or this_command(), **environment()}
    found = Survey(plan=plan)
    code = 0
    try:
        _ask(plan, out, found)
    except (PayloadError, ServerError, AccuracyError) as error:
        if not found.asked:
            fail(str(error))
        code, found.ended_early = 1, found.ended_early or str(error)
    except KeyboardInterrupt:
        if not found.asked:
            console.print("\nstopped; nothing was asked yet, and no server of ours is left")
            raise typer.Exit(130) from None
        code, found.ended_early = 130, "interrupted"
        console.print("\nstopped; no server of ours is left, and this is what was answered until then")
    _report(found, out, tolerance=tolerance, about=about)
    measured = figures(found, tolerance=tolerance)
    missed = any(one.check and one.check.same_set and not one.check.holds for one in measured)
    failed = any(one.failed for one in measured)
    raise typer.Exit(code or int(missed or failed or found.ended_early is not None))


def _ask(plan: Plan, out: Path, found: Survey) -> None:
    with progress_bar() as progress:
        bar = progress.add_task("starting", total=None)
        survey(
            plan,
            out,
            found,
            on_progress=lambda done, total: progress.update(bar, description="images", completed=done, total=total),
        )


def _report(found: Survey, out: Path, *, tolerance: float, about: dict[str, str]) -> None:
    accuracy_report.write(found, out, tolerance=tolerance, about=about)
    Console(width=max(130, Console().width)).print(accuracy_report.table(found, tolerance=tolerance))
    for warning in accuracy_report.warnings(found):
        warn(warning)
    typer.echo(f"{accuracy_report.summary(found)}.")
    for line in accuracy_report.comparison_lines(found):
        typer.echo(line)
    typer.echo(f"report: {out / 'report.md'}")
