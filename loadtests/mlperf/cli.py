"""The command `mlperf`."""

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from loadtests.experiment import command as cli
from loadtests.experiment.environment import this_command
from loadtests.mlperf.plan import SCENARIOS, Plan, Scenario
from loadtests.mlperf.report import write
from loadtests.mlperf.run import MlperfRun, run_scenarios


def mlperf(
    model: Annotated[str, typer.Option(help="Name of a model or a family.")],
    repository: Annotated[
        Path | None,
        typer.Option(
            help="Folder of model bundles, served by a new process per scenario. [models]", show_default=False
        ),
    ] = None,
    url: cli.Url = None,
    out: Annotated[
        Path, typer.Option(help="Folder for report.md, results.json, and the logs of LoadGen and server by scenario.")
    ] = Path("results/mlperf"),
    data: cli.Data = None,
    scenarios: Annotated[
        str, typer.Option(help="Which to run, separated by commas; they run in this order.")
    ] = ",".join(SCENARIOS),
    full: Annotated[
        bool, typer.Option("--full", help="MLPerf's own minimum durations (600 s) and counts, instead of --seconds.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=1, help="Minimum seconds of each scenario, without --full.")] = 10.0,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="AccuracyOnly mode: each labelled image once, for top-1.")
    ] = False,
    target_qps: Annotated[
        float | None, typer.Option(min=0.1, help="Queries a second of the Server scenario. [--load of Offline's]")
    ] = None,
    load: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="The Server scenario's rate as a fraction of Offline's, else of the warm-up's."
        ),
    ] = 0.6,
    latency_ms: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Latency that 99 % of the Server scenario's queries must meet. [100; with --full 15]"
        ),
    ] = None,
    connections: Annotated[
        int, typer.Option(min=1, max=1024, help="Connections in Offline and Server; SingleStream has one.")
    ] = 128,
    service_args: cli.ServiceArgs = "",
    command: cli.Command = None,
) -> None:
    """Let MLPerf LoadGen drive the service over HTTP, and report its verdict: VALID or INVALID, and why.

    SingleStream, Offline and Server, each with a new server and a LoadGen process of its own. Exit code 1 if any
    request failed, whatever LoadGen says; LoadGen's verdict alone does not change the exit code.

    Example: `stridevit loadtest mlperf --model cifar100-csra-r2 --data photos`
    """
    plan = Plan(
        model=model,
        repository=cli.repository_unless(url, repository, service_args),
        url=url,
        data=data,
        scenarios=_parse_scenarios(scenarios),
        accuracy=accuracy,
        full=full,
        seconds=seconds,
        target_qps=target_qps,
        load=load,
        latency_ms=100.0 if latency_ms is None and not full else latency_ms,
        connections=connections,
        service_arguments=tuple(shlex.split(service_args)),
    )
    results = MlperfRun(plan=plan, command=command or this_command())
    measure = partial(run_scenarios, results, out)
    code = cli.run_measurement(results, measure, report=lambda: write(results, out))
    if results.failed:
        cli.error(f"{results.failed:,} requests failed, which LoadGen cannot know: see the report")
    raise typer.Exit(code or int(results.failed > 0))


def _parse_scenarios(text: str) -> tuple[Scenario, ...]:
    wanted = {name.casefold() for name in cli.names(text)}
    chosen = tuple(name for name in SCENARIOS if name.casefold() in wanted)
    if not wanted or len(chosen) != len(wanted):
        cli.fail(f"--scenarios {text!r}: give some of {', '.join(SCENARIOS)}, separated by commas")
    return chosen
