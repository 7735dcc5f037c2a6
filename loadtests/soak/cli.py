"""The command `soak`."""

import shlex
import tempfile
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from loadtests.errors import LoadTestError
from loadtests.experiment import command as cli
from loadtests.experiment.arms import parse_arm
from loadtests.experiment.environment import this_command
from loadtests.experiment.model import Arm, Progress
from loadtests.experiment.run import Bench
from loadtests.soak.numbered import MODEL, NumberedRun
from loadtests.soak.report import broken, write
from loadtests.soak.soak import SoakExperiment, SoakPlan, mixed_sizes

_REQUESTS = 10_000


def soak(
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to serve, written as for `compare`: NAME, NAME?max_batch=1, NAME@git:COMMIT. [a model that "
            "answers with the number in the image]",
            show_default=False,
        ),
    ] = None,
    repository: cli.Repository = Path("models"),
    out: cli.Out = Path("results/soak"),
    data: cli.Data = None,
    requests: Annotated[
        int | None, typer.Option(min=100, help=f"Number of requests to send. [{_REQUESTS} without --minutes]")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="How long to send, instead of --requests.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=1, help="Numbered requests a second, in an open loop. [as fast as 16 connections are answered]"
        ),
    ] = None,
    with_faults: Annotated[
        bool, typer.Option("--faults", help="Every minute a mild fault: reloads, and clients that behave badly.")
    ] = False,
    service_args: cli.ServiceArgs = "",
    command: cli.Command = None,
) -> None:
    """Send requests to one service process for a long time, and see whether it stays as it is.

    The report has the memory (PSS) during the first and the last tenth of the requests, and the slopes of memory,
    descriptors, threads and latency. With --model, images of mixed sizes are sent; without, numbered ones through `/v1`
    and `/v2`, and each answer is checked against its request. Exit code 1 if the service dies, or an answer was
    swapped or lost.

    Examples: `stridevit loadtest soak --model cifar100-csra-r2 --requests 100000`,
    `stridevit loadtest soak --requests 1000000`, `stridevit loadtest soak --minutes 60 --rate 50 --faults`
    """
    if minutes is not None and requests is not None:
        cli.fail("--requests and --minutes: give one of them")
    if model is not None and (with_faults or rate is not None):
        cli.fail("--faults and --rate are for numbered requests: leave --model out")
    requests = requests or (_REQUESTS if minutes is None else None)
    arguments, said = tuple(shlex.split(service_args)), command or this_command()
    if model is None:
        if data is not None:
            cli.fail("--data is for --model: without it numbered images are sent")
        plan = SoakPlan(
            # The models are made for the run.
            repository=out / "models",
            arms=(Arm(label=MODEL, model=MODEL),),
            data=None,
            rate=rate,
            faults=with_faults,
            service_arguments=arguments,
            requests=requests,
            minutes=minutes,
        )
        experiment = SoakExperiment(plan=plan, command=said, payloads="numbered images")
        with tempfile.TemporaryDirectory(prefix="stridevit-soak-") as scratch:
            runner = NumberedRun(plan, Path(scratch))
            _run(Bench(experiment, (), out, measure=runner.measure, serve=runner.serve), experiment, out)
    try:
        arm, (images, what) = parse_arm(model), mixed_sizes(data)
    except LoadTestError as problem:
        cli.fail(str(problem))
    if arm.url:
        cli.fail(f"--model {model}: the memory of a server that already runs is unknown")
    plan = SoakPlan(
        repository=repository,
        arms=(arm,),
        data=data,
        service_arguments=arguments,
        requests=requests,
        minutes=minutes,
    )
    experiment = SoakExperiment(plan=plan, command=said, payloads=what, images=images)
    _run(Bench(experiment, (), out, measure=experiment.send), experiment, out)


def _run(bench: Bench, experiment: SoakExperiment, out: Path) -> NoReturn:
    def measure(progress: Progress) -> None:
        with bench.opened(progress, fresh=False):
            bench.rounds(lambda _: (), progress)

    code = cli.run_measurement(experiment, measure, report=lambda: write(experiment, out), store=bench.store)
    raise typer.Exit(code or int(bool(broken(experiment))))
