"""The command `limit`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from loadtests.errors import LoadTestError
from loadtests.experiment import command as cli
from loadtests.experiment.arms import parse_arms
from loadtests.experiment.environment import this_command
from loadtests.experiment.run import Bench
from loadtests.generator.payloads import describe, read_payloads
from loadtests.limit.measure import LimitExperiment, LimitPlan, with_references
from loadtests.limit.report import write


def limit(
    models: Annotated[
        str,
        typer.Option(
            help="Models to measure, separated by commas, written as for `compare`: NAME, NAME?max_batch=1, "
            "NAME@git:COMMIT. Each is compared with its engine limit, and the first of each model with the others."
        ),
    ],
    repository: cli.Repository = Path("models"),
    out: cli.Out = Path("results/limit"),
    data: cli.Data = None,
    rounds: cli.Rounds = 3,
    seconds: cli.Seconds = 10.0,
    warmup: cli.Warmup = 2.0,
    connections: Annotated[
        str, typer.Option(help="Connections of the closed loops, separated by commas; the largest is saturation.")
    ] = "1,32",
    load: Annotated[
        float, typer.Option(min=0.05, max=1, help="Rate of the open loop, as a fraction of the saturated throughput.")
    ] = 0.7,
    fresh: cli.Fresh = False,
    service_args: cli.ServiceArgs = "",
    command: cli.Command = None,
) -> None:
    """Measure the service against the engine limit and a plain FastAPI server: speed, tail latency and memory.

    The engine limit is what `stridevit engine-limit` reaches with the same images and settings but no HTTP.
    `--service-args`, and settings in the environment (`STRIDEVIT_*`), apply to the service and the engine limit alike.
    The same command resumes an interrupted measurement.

    Example: `stridevit loadtest limit --models cifar100-csra-r2 --data photos`; whether the service has become faster:
    `stridevit loadtest limit --models cifar100-csra-r2,cifar100-csra-r2@git:v0.1 --rounds 10`
    """
    try:
        loops = tuple(sorted({int(number) for number in connections.split(",")}))
    except ValueError:
        loops = ()
    if not loops or loops[0] < 1:
        cli.fail(f"--connections {connections!r}: give whole numbers from 1 on, separated by commas")
    try:
        arms, payloads = with_references(parse_arms(models)), read_payloads(data)
    except LoadTestError as problem:
        cli.fail(str(problem))
    plan = LimitPlan(
        repository=repository,
        arms=arms,
        data=data,
        rounds=rounds,
        seconds=seconds,
        warmup_seconds=warmup,
        connections=loops,
        load_fraction=load,
        service_arguments=tuple(shlex.split(service_args)),
    )
    cli.console.print(f"{rounds * len(arms)} blocks, about {plan.estimated_seconds() / 60:.1f} minutes")
    experiment = LimitExperiment(plan=plan, command=command or this_command(), payloads=describe(payloads, data))
    bench = Bench(experiment, payloads, out)
    cli.run_rounds(bench, plan.loads, fresh=fresh, report=lambda: write(experiment, out))
