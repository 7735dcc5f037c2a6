"""The command `overload`."""

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtests.errors import LoadTestError
from loadtests.experiment import command as cli
from loadtests.experiment.environment import this_command
from loadtests.experiment.model import Arm
from loadtests.experiment.run import Bench
from loadtests.experiment.schedule import Costs
from loadtests.experiment.server import Server
from loadtests.generator.payloads import describe, read_payloads
from loadtests.generator.rates import Part, parse_rates
from loadtests.overload.estimates import estimates
from loadtests.overload.measure import CONNECTIONS, OverloadExperiment, OverloadPlan, top1_of_models
from loadtests.overload.report import write

_BARE = Arm(label="bare 429", model="", kind="refusing")
_LOADS = 3
"""Loads of a block, for the estimate of the time."""


def overload(
    models: Annotated[str, typer.Option(help="Names of models or families, separated by commas.")],
    repository: cli.Repository = Path("models"),
    out: cli.Out = Path("results/overload"),
    data: cli.Data = None,
    levels: Annotated[
        str,
        typer.Option(help="Arrivals as multiples of what a closed loop has just reached, separated by commas."),
    ] = "1,2,5,10",
    connections: Annotated[
        str, typer.Option(help="How the levels are sent: on `kept` connections, on a `new` one per request, or both.")
    ] = ",".join(CONNECTIONS),
    seconds: Annotated[float, typer.Option(min=2, help="Seconds of each level, and of the closed loop.")] = 10.0,
    steps: Annotated[
        str,
        typer.Option(help="Instead of levels: arrivals per second and seconds, as RATE:SECONDS, separated by commas."),
    ] = "",
    deadline_ms: Annotated[float, typer.Option(min=1, help="Deadline of every request.")] = 250.0,
    pin: Annotated[
        bool,
        typer.Option(help="Give the generator a core of its own, and the service the others; not with one core."),
    ] = True,
    bursts: Annotated[
        int, typer.Option(min=0, help="Bursts before the levels, which show how well Retry-After is predicted.")
    ] = 5,
    rounds: cli.Rounds = 3,
    fresh: cli.Fresh = False,
    service_args: cli.ServiceArgs = "",
    command: cli.Command = None,
) -> None:
    """Send more than a model can answer: goodput, refusals, latency, memory and recovery, for models and families.

    Poisson arrivals in an open loop; latency and deadline count from the moment at which a request was due. The service
    serves all models of the repository. The same command resumes an interrupted measurement.

    Example: `stridevit loadtest overload --models cifar100-mha,cifar100 --data photos --deadline-ms 2000`
    """
    try:
        parts = parse_rates(steps) if steps else ()
        payloads = read_payloads(data)
    except ValueError as problem:
        cli.fail(f"--steps {steps!r}: {problem}")
    except LoadTestError as problem:
        cli.fail(str(problem))
    if any(part.first != part.last for part in parts):
        cli.fail(f"--steps {steps!r}: a ramp is no step: give RATE:SECONDS, separated by commas")
    multiples = () if parts else _parse_levels(levels)
    arms = tuple(Arm(label=name, model=name) for name in cli.names(models))
    first, *others = sorted(os.sched_getaffinity(0))
    plan = OverloadPlan(
        repository=repository,
        arms=arms if parts else (*arms, _BARE),
        data=data,
        rounds=rounds,
        seconds=sum(part.seconds for part in parts) or seconds,
        steps=tuple((part.first, part.seconds) for part in parts),
        levels=multiples,
        connections=() if parts else _parse_connections(connections),
        deadline_ms=deadline_ms,
        bursts=0 if parts else bursts,
        service_arguments=tuple(shlex.split(service_args)),
        generator_cores=(first,) if pin and others else (),
        server_cores=tuple(others) if pin else (),
    )
    blocks = rounds * len(plan.arms)
    minutes = _minutes(plan, parts)
    cli.console.print(f"{blocks} blocks, about {minutes:.1f} minutes")
    experiment = OverloadExperiment(plan=plan, command=command or this_command(), payloads=describe(payloads, data))

    def describe_block(arm: Arm, server: Server, _repository: Path) -> dict[str, Any]:
        info = top1_of_models(server)
        if not plan.bursts:
            return info
        cores = plan.generator_cores
        return info | estimates(arm, server, payloads, deadline_ms=deadline_ms, bursts=plan.bursts, cores=cores)

    bench = Bench(experiment, payloads, out, describe=describe_block, everything=True)
    cli.run_rounds(bench, plan.loads, fresh=fresh, report=lambda: write(experiment, out))


def _minutes(plan: OverloadPlan, parts: tuple[Part, ...]) -> float:
    costs = Costs()
    if parts:
        return plan.rounds * len(plan.arms) * costs.block(plan, loads=1) / 60
    loads = [load for arm in plan.arms for load in plan.loads(arm)]
    longer = sum(sum(seconds for _, seconds in load.steps) - plan.seconds for load in loads if load.steps)
    return plan.rounds * (len(plan.arms) * costs.server + len(loads) * costs.load(plan) + longer) / 60


def _parse_levels(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(word) for word in cli.names(text))
    except ValueError:
        found = ()
    if not found or not all(0 < level <= 100 for level in found):
        cli.fail(f"--levels {text!r}: give numbers above 0 and up to 100, separated by commas, such as 1,2,5,10")
    return found


def _parse_connections(text: str) -> tuple[str, ...]:
    found = cli.names(text)
    if not found or not set(found) <= set(CONNECTIONS):
        cli.fail(f"--connections {text!r}: give {' or '.join(CONNECTIONS)}, or both, separated by a comma")
    return found
