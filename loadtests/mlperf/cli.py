"""`python -m loadtests mlperf`: the command line."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from loadtests.experiment.command import (
    Command,
    Data,
    ServiceArgs,
    console,
    end_as_if_interrupted,
    error,
    fail,
    this_command,
)
from loadtests.experiment.environment import environment
from loadtests.experiment.server import ServerError
from loadtests.generator.payloads import PayloadError
from loadtests.mlperf import report as mlperf_report
from loadtests.mlperf.drive import SCENARIOS, SHORT_LATENCY_MS, MlperfError, Plan, Results, Scenario, drive


def mlperf(
    model: Annotated[str, typer.Option(help="Name of a model, or of a family.")],
    repository: Annotated[
        Path | None,
        typer.Option(
            help="Folder of bundles; the model is served afresh for each scenario. [models]", show_default=False
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Instead: of a service that runs, http://...")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for report.md, results.json, and the logs of each scenario.")
    ] = Path("results/mlperf"),
    data: Data = None,
    scenario: Annotated[
        str, typer.Option(help="Which, separated by commas; all run one after the other, in this order.")
    ] = ",".join(SCENARIOS),
    full: Annotated[
        bool, typer.Option("--full/--short", help="MLPerf's own least durations (600 s) and counts, or a look.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=1, help="Least seconds of each scenario of a short run.")] = 10.0,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="AccuracyOnly mode: each labelled image once, for top-1.")
    ] = False,
    target_qps: Annotated[
        float | None, typer.Option(min=0.1, help="Queries a second of the Server scenario. [--share of Offline's]")
    ] = None,
    share: Annotated[
        float, typer.Option(min=0.01, max=1, help="Of the rate that Offline, or else the warm-up, has reached.")
    ] = 0.6,
    latency_ms: Annotated[
        float | None,
        typer.Option(min=0.1, help="What 99 % of the Server scenario's queries must keep. [100; with --full 15]"),
    ] = None,
    connections: Annotated[
        int, typer.Option(min=1, max=1024, help="Of the Offline and Server scenarios; SingleStream has one.")
    ] = 128,
    service_args: ServiceArgs = "",
    command: Command = None,
) -> None:
    """Let MLPerf LoadGen drive the service over HTTP, and report its verdict: VALID or INVALID, and why.

    SingleStream, Offline and Server, each with a fresh server and a LoadGen process of its own. Ends with 1 if any
    request failed, whatever LoadGen says; LoadGen's verdict alone does not change the exit code.

    Example: `python -m loadtests mlperf --model cifar100-csra-r2 --data photos`
    """
    if repository is not None and url is not None:
        fail("give either --repository, to start the service, or --url of one that runs")
    if url is not None and not url.startswith(("http://", "https://")):
        fail(f"--url {url!r}: must begin with http:// or https://")
    if url is not None and service_args:
        fail("--service-args are for a service that is started here, not for one at --url")
    plan = Plan(
        model=model,
        repository=None if url else repository or Path("models"),
        url=url,
        data=data,
        scenarios=_scenarios(scenario),
        accuracy=accuracy,
        full=full,
        seconds=seconds,
        target_qps=target_qps,
        share=share,
        latency_ms=SHORT_LATENCY_MS if latency_ms is None and not full else latency_ms,
        connections=connections,
        service_arguments=tuple(shlex.split(service_args)),
    )
    end_as_if_interrupted()
    try:
        said = command or this_command()
        results = Results(plan=plan, command=said, environment=environment())
        code = _drive(plan, out, results)
        mlperf_report.write(results, out)
        Console(width=max(150, Console().width)).print(mlperf_report.table(results))
    except (PayloadError, ServerError, MlperfError) as problem:
        fail(str(problem))
    except KeyboardInterrupt:
        console.print("\nstopped; LoadGen and the service are gone, and no scenario was over")
        raise typer.Exit(130) from None
    if results.failed:
        error(f"{results.failed:,} requests failed, which LoadGen cannot know: see the report")
    typer.echo(f"report: {out / 'report.md'}")
    raise typer.Exit(code or (1 if results.failed else 0))


def _drive(plan: Plan, out: Path, results: Results) -> int:
    """The exit code; what ends a run after a scenario was over is told, not raised."""
    minutes = sum(map(plan.expected_seconds, plan.scenarios)) / 60
    console.print(f"{', '.join(plan.scenarios)}: about {minutes:.1f} minutes" + _at_least(plan))
    try:
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), console=console
        ) as progress:
            bar = progress.add_task("reading images", total=None, said="")

            def tell(scenario: Scenario, seconds: float) -> None:
                expected = plan.expected_seconds(scenario)
                progress.update(
                    bar,
                    description=scenario,
                    total=expected,
                    completed=min(seconds, expected),
                    said=f"{seconds:.0f} of about {expected:.0f} s",
                )

            drive(plan, out, results, on_step=tell)
    except (KeyboardInterrupt, ServerError, MlperfError) as problem:
        if not results.runs:
            raise
        if isinstance(problem, KeyboardInterrupt):
            results.ended_early = "interrupted"
            console.print("\nstopped; LoadGen and the service are gone, and this is what was over until then")
            return 130
        results.ended_early = "a server failed" if isinstance(problem, ServerError) else "LoadGen failed"
        error(str(problem))
        return 1
    return 0


def _at_least(plan: Plan) -> str:
    return ", and as long as each image takes" if plan.accuracy else ""


def _scenarios(text: str) -> tuple[Scenario, ...]:
    asked = {name.strip().casefold() for name in text.split(",") if name.strip()}
    chosen = tuple(name for name in SCENARIOS if name.casefold() in asked)
    if not asked or len(chosen) != len(asked):
        fail(f"--scenario {text!r}: give some of {', '.join(SCENARIOS)}, separated by commas")
    return chosen
