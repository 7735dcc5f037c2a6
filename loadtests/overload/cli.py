"""The command `overload`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from loadtests.errors import LoadTestError
from loadtests.experiment import command as cli
from loadtests.experiment.environment import this_command
from loadtests.experiment.model import Arm
from loadtests.experiment.run import Bench
from loadtests.experiment.schedule import Costs
from loadtests.generator.payloads import describe, read_payloads
from loadtests.generator.rates import parse_rates
from loadtests.overload.measure import OverloadExperiment, OverloadPlan, top1_of_models
from loadtests.overload.report import write


def overload(
    models: Annotated[str, typer.Option(help="Names of models or families, separated by commas.")],
    repository: cli.Repository = Path("models"),
    out: cli.Out = Path("results/overload"),
    data: cli.Data = None,
    steps: Annotated[
        str, typer.Option(help="Arrivals per second, and for how many seconds: RATE:SECONDS, separated by commas.")
    ] = "200:8,800:12,200:8",
    deadline_ms: Annotated[float, typer.Option(min=1, help="Deadline of every request.")] = 100.0,
    rounds: cli.Rounds = 3,
    fresh: cli.Fresh = False,
    service_args: cli.ServiceArgs = "",
    command: cli.Command = None,
) -> None:
    """Send more than a model can answer, and compare what a fixed model and a family make of it.

    Poisson arrivals in an open loop; latency counts from the moment at which a request was due. The service serves all
    models of the repository. The same command resumes an interrupted measurement.

    Example: `stridevit loadtest overload --models cifar100-mha,cifar100`
    """
    try:
        parts = parse_rates(steps)
        payloads = read_payloads(data)
    except ValueError as problem:
        cli.fail(f"--steps {steps!r}: {problem}")
    except LoadTestError as problem:
        cli.fail(str(problem))
    if any(part.first != part.last for part in parts):
        cli.fail(f"--steps {steps!r}: a ramp is no step: give RATE:SECONDS, separated by commas")
    plan = OverloadPlan(
        repository=repository,
        arms=tuple(Arm(label=name, model=name) for name in cli.names(models)),
        data=data,
        rounds=rounds,
        seconds=sum(part.seconds for part in parts),
        steps=tuple((part.first, part.seconds) for part in parts),
        deadline_ms=deadline_ms,
        service_arguments=tuple(shlex.split(service_args)),
    )
    blocks = rounds * len(plan.arms)
    cli.console.print(f"{blocks} blocks, about {blocks * Costs().block(plan, loads=1) / 60:.1f} minutes")
    experiment = OverloadExperiment(plan=plan, command=command or this_command(), payloads=describe(payloads, data))
    bench = Bench(experiment, payloads, out, describe=top1_of_models, everything=True)
    cli.run_rounds(bench, plan.loads, fresh=fresh, report=lambda: write(experiment, out))
