"""The command `accuracy`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from loadtests.accuracy import report
from loadtests.accuracy.evaluate import AccuracyRun, Plan, evaluate
from loadtests.accuracy.results import model_results
from loadtests.experiment import command as cli
from loadtests.experiment.environment import this_command


def accuracy(
    model: cli.Model,
    data: Annotated[
        Path,
        typer.Option(
            help="Labelled images: a folder of parquet files (its test split), of class folders, or of image files "
            "with a labels.csv (columns file, and index or label)."
        ),
    ],
    repository: Annotated[
        Path | None, typer.Option(help="Folder of model bundles, served by a new process. [models]", show_default=False)
    ] = None,
    url: cli.Url = None,
    reference: Annotated[
        str | None, typer.Option(help="Another model of the same server, to compare with on the same images.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most that many images, from the first. [all]")] = None,
    connections: Annotated[int, typer.Option(min=1, max=256, help="Concurrent requests.")] = 8,
    max_drop_points: Annotated[
        float,
        typer.Option(
            min=0, help="Percentage points by which top-1 may differ from the manifest's, on the manifest's images."
        ),
    ] = 0.1,
    out: Annotated[
        Path, typer.Option(help="Folder for report.md, results.json, disagreements.csv and the server's log.")
    ] = Path("results/accuracy"),
    service_args: cli.ServiceArgs = "",
    command: cli.Command = None,
) -> None:
    """Send a whole labelled set to a served model, and report top-1 and top-5 as a client sees them.

    They are compared with the model's manifest and, with `--reference`, image by image with another model. A request
    that fails counts as wrong. Exit code 1 if any request failed, or if a model misses its manifest's accuracy on the
    same images.

    Example: `stridevit loadtest accuracy --model cifar100-csra-r2 --reference cifar100-mha --data cifar100`
    """
    if reference == model:
        cli.fail(f"--reference {reference} is the model itself")
    plan = Plan(
        models=(model,) if reference is None else (model, reference),
        data=data,
        url=url,
        repository=cli.repository_unless(url, repository, service_args),
        limit=limit,
        connections=connections,
        max_drop_points=max_drop_points,
        service_arguments=tuple(shlex.split(service_args)),
    )
    run = AccuracyRun(plan=plan, command=command or this_command())
    code = cli.run_measurement(
        run, lambda progress: evaluate(run, out, progress), report=lambda: report.write(run, out)
    )
    raise typer.Exit(code or int(any(result.failed or result.misses_manifest for result in model_results(run))))
