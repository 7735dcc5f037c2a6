"""`python -m loadtests overload`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from loadtests.experiment.command import (
    Command,
    Data,
    ServiceArgs,
    console,
    end_as_if_interrupted,
    error,
    fail,
    progress_bar,
    this_command,
)
from loadtests.experiment.environment import environment
from loadtests.experiment.json_files import write_json
from loadtests.experiment.server import ServerError
from loadtests.generator.payloads import PayloadError
from loadtests.generator.rates import parse_rates
from loadtests.overload import measure as report
from loadtests.overload.measure import Plan
from loadtests.overload.measure import overload as run_overload

_START_STOP_SECONDS = 8
"""What a block costs beside its load, for the estimate."""


def overload(
    repository: Annotated[Path, typer.Option(help="Folder of bundles; all of them are served.")],
    targets: Annotated[str, typer.Option(help="Names of models or families, separated by commas.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md, results.json, overload.svg and server logs.")] = Path(
        "results/overload"
    ),
    data: Data = None,
    steps: Annotated[str, typer.Option(help="Arrivals a second and seconds: RATE:SECONDS,...")] = "200:8,800:12,200:8",
    deadline_ms: Annotated[float, typer.Option(min=1, help="Of every request.")] = 100.0,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks a target, interleaved.")] = 3,
    service_args: ServiceArgs = "",
    command: Command = None,
) -> None:
    """Send more than a model can answer, and see what a fixed model and a family make of it.

    An open loop of Poisson arrivals; latency counts from the moment at which a request was due.

    Example: `python -m loadtests overload --repository models --targets cifar100-mha,cifar100`
    """
    try:
        parts = parse_rates(steps)
    except ValueError as problem:
        fail(f"--steps {steps!r}: {problem}")
    if any(part.first != part.last for part in parts):
        fail(f"--steps {steps!r}: a ramp cannot be told by steps: give RATE:SECONDS, separated by commas")
    parsed = [(part.first, part.seconds) for part in parts]
    plan = Plan(
        repository=repository,
        targets=tuple(name.strip() for name in targets.split(",") if name.strip()),
        data=data,
        steps=parsed,
        deadline_ms=deadline_ms,
        rounds=rounds,
        service_arguments=tuple(shlex.split(service_args)),
    )
    total = len(plan.order())
    minutes = total * (sum(seconds for _, seconds in parsed) + _START_STOP_SECONDS) / 60
    console.print(f"{total} blocks, about {minutes:.1f} minutes")
    end_as_if_interrupted()
    code, early = 0, ""
    blocks: list[report.Block] = []
    try:
        with progress_bar() as progress:
            bar = progress.add_task("starting", total=total)
            run_overload(
                plan, out, blocks, on_block=lambda name, done, _: progress.update(bar, description=name, completed=done)
            )
            progress.update(bar, completed=total)
    except (PayloadError, ServerError) as problem:
        error(str(problem))
        code, early = 1, "a server failed"
    except KeyboardInterrupt:
        console.print("\nstopped; the services of this measurement are gone")
        code, early = 130, "interrupted"
    if {block.target for block in blocks} < set(plan.targets):
        console.print("not every target was measured once: there is nothing to report but the services' logs")
        raise typer.Exit(code)
    found = report.results(plan, blocks)
    about = {"command": command or this_command(), **({"ended early": early} if early else {}), **environment()}
    table = report.markdown(found)
    write_json(report.as_json(plan, blocks, found, about), out / "results.json")
    facts = "".join(f"- {name}: {value}\n" for name, value in about.items())
    (out / "report.md").write_text(f"# A step overload\n\n{table}\n{facts}", encoding="utf-8")
    report.plot(plan, blocks, out / "overload.svg")
    typer.echo(table)
    typer.echo(f"report: {out / 'report.md'}")
    raise typer.Exit(code)
