"""The command `fronts`."""

import shlex
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from loadtests.errors import LoadTestError
from loadtests.experiment import command as cli
from loadtests.experiment.arms import parse_arm
from loadtests.experiment.environment import this_command
from loadtests.experiment.model import Arm
from loadtests.experiment.run import Bench
from loadtests.experiment.server import Server
from loadtests.fronts.measure import Budget, FrontsExperiment, FrontsPlan, describer
from loadtests.fronts.report import write
from loadtests.fronts.serving import Setting, Started, fronts
from loadtests.generator.payloads import describe, parse_sizes, read_payloads

_SIZES = "320x240"


def fronts_command(
    model: Annotated[str, typer.Option(help="Model to serve; one of --repository.")] = "cifar100-csra-r2",
    repository: cli.Repository = Path("models"),
    out: cli.Out = Path("results/fronts"),
    data: cli.Data = None,
    sizes: Annotated[
        str | None, typer.Option(help=f"Sizes of generated JPEGs, with weights: '640x480:3,1920x1080:1'. [{_SIZES}]")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Fronts to measure besides `one process`, separated by commas. [all]")
    ] = None,
    workers: Annotated[int, typer.Option(min=2, max=64, help="Workers behind each front.")] = 2,
    rounds: cli.Rounds = 6,
    seconds: cli.Seconds = 3.0,
    warmup: cli.Warmup = 0.5,
    budget: Annotated[float, typer.Option(min=0.1, help="In minutes; no round is begun that would exceed it.")] = 10.0,
    load: Annotated[
        float,
        typer.Option(min=0.05, max=0.95, help="Rate of the open loop, as a fraction of the saturated throughput."),
    ] = 0.6,
    start_once: Annotated[
        bool,
        typer.Option(
            "--start-once",
            help="For a slow machine: start each front once, not for every block; the others stay idle meanwhile.",
        ),
    ] = False,
    fresh: cli.Fresh = False,
    service_args: cli.ServiceArgs = "",
    command: cli.Command = None,
) -> None:
    """Measure what a front before several workers costs, and how evenly it distributes requests to them.

    One process without a front, `--workers` with Envoy and without (SO_REUSEPORT), nginx and HAProxy, in interleaved
    rounds; each at 1 and at 16 connections. A front that is not installed is skipped, with the reason. An open loop at
    a known load is compared with the queueing model of `loadtest capacity`. The same command resumes an interrupted
    measurement.

    Example: `stridevit loadtest fronts --only Envoy,HAProxy --rounds 10 --budget 20`
    """
    if sizes and data:
        cli.fail("--sizes describes generated images: it does not go with --data")
    names = {front.label: front for front in fronts()}
    chosen = cli.names(only) if only else tuple(names)
    if unknown := set(chosen) - names.keys():
        cli.fail(f"--only {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    try:
        served = parse_arm(model)
        payloads = read_payloads(data, sizes=parse_sizes(sizes or _SIZES))
    except (LoadTestError, ValueError) as problem:
        cli.fail(str(problem))
    if served.label != served.model:
        cli.fail(f"--model {model}: give the name of a model alone; settings go into --service-args")
    skipped = {front.label: why for front in names.values() if (why := front.missing()) and front.label in chosen}
    for label, why in skipped.items():
        cli.warn(f"{label} is skipped: {why}")
    first = next(iter(names))
    labels = [label for label in names if label == first or (label in chosen and label not in skipped)]
    plan = FrontsPlan(
        repository=repository,
        arms=tuple(Arm(label=label, model=model) for label in labels),
        data=data,
        rounds=rounds,
        seconds=seconds,
        warmup_seconds=warmup,
        service_arguments=tuple(shlex.split(service_args)),
        workers=workers,
        connections=(1, 16),
        load_fraction=load,
        budget_minutes=budget,
        start_once=start_once,
        skipped=tuple(skipped.items()),
    )
    cli.console.print(
        f"{rounds * len(labels)} blocks, about {plan.estimated_seconds() / 60:.1f} minutes on a quiet machine; "
        f"at most {budget:g} minutes"
    )
    experiment = FrontsExperiment(plan=plan, command=command or this_command(), payloads=describe(payloads, data))
    setting = Setting(repository=repository, model=model, workers=workers, arguments=plan.service_arguments)

    def serve(label: str, log: Path) -> AbstractContextManager[Server]:
        return names[label].serve(setting, log)

    with Started(serve) as started:
        server = started.serve if start_once else serve
        bench = Bench(
            experiment,
            payloads,
            out,
            describe=describer(payloads),
            serve=lambda arm, log: server(arm.label, log),
        )
        cli.run_rounds(bench, plan.loads, fresh=fresh, report=lambda: write(experiment, out), stop=Budget(budget).stop)
