"""The command `soak`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from loadtests.experiment import command as cli
from loadtests.experiment.environment import this_command
from loadtests.soak.soak import Soak, send, write


def soak(
    model: cli.Model,
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
    cli.console.print(f"{requests:,} requests: {requests / 300 / 60:.1f} minutes at 300 per second")
    found = Soak(model=model, planned_requests=requests, command=command or this_command())
    flags = shlex.split(service_args)
    code = cli.run_measurement(
        found,
        lambda progress: send(found, progress, repository=repository, data=data, out=out, flags=flags),
        report=lambda: write(found, out),
    )
    raise typer.Exit(code)
