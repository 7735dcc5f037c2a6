"""The command `accuracy`."""

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from loadtests.accuracy.ask import ask, check_reference, choose_images
from loadtests.accuracy.report import write
from loadtests.accuracy.results import AccuracyExperiment, AccuracyPlan, fails, figures
from loadtests.errors import LoadTestError
from loadtests.experiment import command as cli
from loadtests.experiment.arms import parse_arm
from loadtests.experiment.environment import this_command
from loadtests.experiment.model import Progress
from loadtests.experiment.run import Bench
from loadtests.generator.readers import state


def accuracy(
    model: Annotated[
        str,
        typer.Option(
            help="Model to measure, written as for `compare`: NAME, NAME?max_batch=1, NAME@http://HOST:PORT, "
            "NAME@git:COMMIT."
        ),
    ],
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
        str | None, typer.Option(help="Another model, written likewise, to compare with on the same images.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of images, from the first. [all]")] = None,
    connections: Annotated[int, typer.Option(min=1, max=256, help="Concurrent requests.")] = 8,
    max_drop_points: Annotated[
        float,
        typer.Option(
            min=0, help="Percentage points by which top-1 may differ from the manifest's, on the manifest's images."
        ),
    ] = 0.1,
    out: Annotated[
        Path, typer.Option(help="Folder for report.md, results.json, disagreements.csv and the servers' logs.")
    ] = Path("results/accuracy"),
    fresh: cli.Fresh = False,
    service_args: cli.ServiceArgs = "",
    command: cli.Command = None,
) -> None:
    """Send a whole labelled set to a served model, and report top-1 and top-5 as a client sees them.

    They are compared with the model's manifest and, with `--reference`, image by image with another model, which is
    queried next. A request that fails counts as wrong. Exit code 1 if any request failed, or if a model misses its
    manifest's accuracy on the same images. The same command resumes an interrupted measurement, model by model.

    Example: `stridevit loadtest accuracy --model cifar100-csra-r2 --reference cifar100-mha --data cifar100`
    """
    if reference == model:
        cli.fail(f"--reference {reference} is the model itself")
    repository = cli.repository_unless(url, repository, service_args)
    try:
        arms = tuple(parse_arm(name) for name in (model, reference) if name is not None)
        source, positions = choose_images(data, limit, labelled=reference is None)
    except LoadTestError as problem:
        cli.fail(str(problem))
    if url is not None:
        if any(arm.settings or arm.url or arm.commit for arm in arms):
            cli.fail("--url goes with models by their names alone")
        arms = tuple(replace(arm, url=url) for arm in arms)
    plan = AccuracyPlan(
        repository=repository,
        arms=arms,
        data=data,
        limit=limit,
        connections=connections,
        max_drop_points=max_drop_points,
        service_arguments=tuple(shlex.split(service_args)),
    )
    run = AccuracyExperiment(
        plan=plan, command=command or this_command(), payloads=source.description, source=source, positions=positions
    )
    bench = Bench(run, (), out, measure=partial(ask, run))

    def measure(progress: Progress) -> None:
        with bench.opened(progress, fresh=fresh, labels=run.labels, files=state(data)):
            check_reference(run, bench)
            bench.rounds(lambda _: (), progress)

    code = cli.run_measurement(run, measure, report=lambda: write(run, out), store=bench.store)
    raise typer.Exit(code or int(fails(figures(run))))
