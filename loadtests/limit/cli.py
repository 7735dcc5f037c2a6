"""`python -m loadtests limit`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loadtests.experiment.command import (
    Command,
    Data,
    Repository,
    ServiceArgs,
    console,
    end_as_if_interrupted,
    error,
    fail,
    progress_bar,
    this_command,
)
from loadtests.experiment.environment import environment
from loadtests.experiment.server import ServerError
from loadtests.generator.payloads import PayloadError
from loadtests.limit import report as limit_report
from loadtests.limit.measure import Plan, Results, measure
from loadtests.soak import soak as soaking


def limit(
    repository: Repository,
    model: Annotated[str, typer.Option(help="Name; its newest version is measured.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md, results.json and server logs.")] = Path(
        "results/limit"
    ),
    data: Data = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times each arm is measured, interleaved.")] = 3,
    seconds: Annotated[float, typer.Option(min=1, help="Measured seconds of each load.")] = 10.0,
    warmup: Annotated[float, typer.Option(min=0, help="Seconds dropped at the start of each load.")] = 2.0,
    connections: Annotated[
        str, typer.Option(help="Connections of the closed loops, separated by commas; the most is saturation.")
    ] = "1,32",
    load: Annotated[
        float, typer.Option(min=0.05, max=1, help="Of the saturated rate, offered in the open loop.")
    ] = 0.7,
    soak: Annotated[
        int | None,
        typer.Option(min=100, help="Instead: send so many images of mixed sizes, and see if memory stays flat."),
    ] = None,
    service_args: ServiceArgs = "",
    command: Command = None,
) -> None:
    """Measure the service against the engine limit and a plain FastAPI server: speed, tail latency and memory.

    Settings in the environment (`STRIDEVIT_*`) reach the service and the engine limit alike, `--service-args` the
    service only.

    Example: `python -m loadtests limit --repository models --model cifar100-mha --data photos`
    """
    try:
        loops = tuple(sorted({int(number) for number in connections.split(",")}))
    except ValueError:
        loops = ()
    if not loops or loops[0] < 1:
        fail(f"--connections {connections!r}: give whole numbers from 1 on, separated by commas")
    said = command or this_command()
    arguments = tuple(shlex.split(service_args))
    end_as_if_interrupted()
    try:
        if soak is None:
            plan = Plan(
                repository=repository,
                model=model,
                data=data,
                rounds=rounds,
                seconds=seconds,
                warmup_seconds=warmup,
                connections=loops,
                load_fraction=load,
                service_arguments=arguments,
            )
            _limit(plan, out, said)
        else:
            _soak(repository, model, data, requests=soak, arguments=arguments, command=said, out=out)
    except (PayloadError, ServerError) as problem:
        fail(str(problem))
    except KeyboardInterrupt:
        console.print("\nstopped; the servers of this measurement are gone, and nothing was measured")
        raise typer.Exit(130) from None


def _limit(plan: Plan, out: Path, command: str) -> None:
    console.print(f"{plan.total()} measurements, about {plan.estimated_seconds() / 60:.1f} minutes")
    results = Results(plan=plan, command=command, environment=environment())
    code = 0
    try:
        with progress_bar() as progress:
            bar = progress.add_task("starting", total=plan.total())
            measure(
                plan, out, results, on_step=lambda what, done: progress.update(bar, description=what, completed=done)
            )
            progress.update(bar, completed=plan.total())
    except (KeyboardInterrupt, ServerError) as problem:
        if not (results.drives or results.limits):
            raise
        if isinstance(problem, ServerError):
            code, results.ended_early = 1, "a server failed"
            error(str(problem))
        else:
            code, results.ended_early = 130, "interrupted"
            console.print("\nstopped; the servers of this measurement are gone, and this is what they did until then")
    limit_report.write(results, out)
    for table in limit_report.tables(results):
        Console(width=max(190, Console().width)).print(table)
    typer.echo(f"report: {out / 'report.md'}")
    raise typer.Exit(code)


def _soak(
    repository: Path,
    model: str,
    data: Path | None,
    *,
    requests: int,
    arguments: tuple[str, ...],
    command: str,
    out: Path,
) -> None:
    console.print(f"{requests:,} requests: at 300 a second, {requests / 300 / 60:.1f} minutes")
    with progress_bar() as progress:
        bar = progress.add_task("requests", total=requests)
        found = soaking.soak(
            repository,
            model,
            data,
            requests=requests,
            arguments=arguments,
            command=command,
            out=out,
            on_progress=lambda sent: progress.update(bar, completed=sent),
        )
    soaking.write(found, out)
    typer.echo("\n".join([*soaking.lines(found), f"report: {out / 'report.md'}"]))
    raise typer.Exit(130 if found.ended_early else 0)
