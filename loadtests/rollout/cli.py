"""The command `rollout`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from loadtests.experiment import command as cli
from loadtests.experiment.environment import this_command
from loadtests.rollout.counters import read
from loadtests.rollout.measure import RolloutPlan, RolloutReading, measure
from loadtests.rollout.report import write


def rollout(
    url: Annotated[str, typer.Option(help="The running service.")] = "http://127.0.0.1:8000",
    seconds: Annotated[float, typer.Option(min=1, help="How long to read its counters, at most.")] = 60.0,
    images: Annotated[
        int | None, typer.Option(min=1, help="End as soon as this many images are compared. [only --seconds]")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Equal parts of the time, from which the interval of the latency is computed.")
    ] = 10,
    out: Annotated[Path, typer.Option(help="Folder for report.md and results.json.")] = Path("results/rollout"),
    key: Annotated[
        str | None,
        typer.Option(envvar="STRIDEVIT_API_KEY", help="API key, where /metrics needs one.", show_default=False),
    ] = None,
    command: cli.Command = None,
) -> None:
    """Report what a shadow or a canary shows: agreement, latency and refusals against the primary, with intervals.

    Sends nothing: the traffic is that of the service's clients. The service must have been started with `--shadow` or
    `--canary`. Exit code 1 if it has neither, or cannot be read.

    Example: `stridevit loadtest rollout --url http://127.0.0.1:8000 --seconds 600 --images 2000`
    """
    plan = RolloutPlan(url=url, seconds=seconds, images=images, rounds=rounds)
    reading = RolloutReading(
        plan=plan, command=command or this_command(), payloads="the traffic of the service's clients"
    )
    code = cli.run_measurement(
        reading,
        lambda progress: measure(reading, progress, partial(read, url, key=key)),
        report=lambda: write(reading, out),
    )
    raise typer.Exit(code)
