"""The command `soak`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from loadtests.errors import LoadTestError
from loadtests.experiment import command as cli
from loadtests.experiment.arms import parse_arm
from loadtests.experiment.environment import this_command
from loadtests.experiment.run import Bench
from loadtests.soak.soak import SoakExperiment, SoakPlan, mixed_sizes, write


def soak(
    model: Annotated[
        str, typer.Option(help="Model to serve, written as for `compare`: NAME, NAME?max_batch=1, NAME@git:COMMIT.")
    ],
    repository: cli.Repository = Path("models"),
    out: cli.Out = Path("results/soak"),
    data: cli.Data = None,
    requests: Annotated[int, typer.Option(min=100, help="Number of requests to send.")] = 10_000,
    service_args: cli.ServiceArgs = "",
    command: cli.Command = None,
) -> None:
    """Send many images of mixed sizes to one service process, and see whether its memory stays flat.

    The report compares the memory (PSS) during the first and the last tenth of the requests. Failed requests are
    counted; exit code 1 if the service dies.

    Example: `stridevit loadtest soak --model cifar100-csra-r2 --requests 100000`
    """
    try:
        arm, (images, what) = parse_arm(model), mixed_sizes(data)
    except LoadTestError as problem:
        cli.fail(str(problem))
    if arm.url:
        cli.fail(f"--model {model}: the memory of a server that already runs is unknown")
    cli.console.print(f"{requests:,} requests: {requests / 300 / 60:.1f} minutes at 300 per second")
    arguments = tuple(shlex.split(service_args))
    plan = SoakPlan(repository=repository, arms=(arm,), data=data, requests=requests, service_arguments=arguments)
    experiment = SoakExperiment(plan=plan, command=command or this_command(), payloads=what, images=images)
    bench = Bench(experiment, (), out, measure=experiment.send)
    cli.run_rounds(bench, lambda _: (), fresh=False, report=lambda: write(experiment, out))
