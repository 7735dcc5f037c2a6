"""`python -m loadtests`: compare models under load."""

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loadtests import limit_report, report
from loadtests import overload as overload_report
from loadtests import soak as soaking
from loadtests.compare import Plan
from loadtests.compare import compare as run_comparison
from loadtests.limit import Plan as LimitPlan
from loadtests.limit import Results, environment, measure
from loadtests.openloop import parse_steps
from loadtests.overload import Plan as OverloadPlan
from loadtests.overload import overload as run_overload
from loadtests.payloads import PayloadError
from loadtests.server import ServerError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Find out which model to run, at which load, at what cost in accuracy and memory.""",
)
console = Console(stderr=True)

_Data = Annotated[
    Path | None,
    typer.Option(help="Images to send: a folder of image files, or of parquet files. [generated JPEGs]"),
]
_ServiceArgs = Annotated[str, typer.Option(help="Flags for the service, as one word: '--engine-threads 2'.")]
_Command = Annotated[str | None, typer.Option(help="What the report says was run. [this command line]")]

_START_STOP_SECONDS = 8
"""What a block costs beside its load, for the estimate."""


@app.command()
def compare(
    repository: Annotated[Path, typer.Option(help="Folder of bundles.")],
    models: Annotated[str, typer.Option(help="Names separated by commas.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, results.json and server logs.")] = Path(
        "results/compare"
    ),
    data: _Data = None,
    users: Annotated[int, typer.Option(min=1, help="Users, each waiting for its answer (closed loop).")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="Measured seconds a block.")] = 10.0,
    warmup: Annotated[float, typer.Option(min=0, help="Seconds dropped at the start of a block.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks a model, interleaved.")] = 4,
) -> None:
    """Serve each model in a process of its own, drive it with Locust, and report speed, memory and accuracy together.

    Example: `python -m loadtests compare --repository models --models cifar100-mha,cifar100-csra-r2 --data photos`
    """
    names = tuple(dict.fromkeys(name.strip() for name in models.split(",") if name.strip()))
    if not names:
        _fail("--models names no model: separate names with commas")
    plan = Plan(
        repository=repository,
        models=names,
        data=data,
        users=users,
        seconds=seconds,
        warmup_seconds=warmup,
        rounds=rounds,
    )
    estimate = len(names) * rounds * (seconds + warmup + _START_STOP_SECONDS)
    console.print(f"{len(names) * rounds} blocks, about {estimate / 60:.1f} minutes")
    _end_as_if_interrupted()
    try:
        with _progress() as progress:
            bar = progress.add_task("starting", total=len(names) * rounds)
            comparison = run_comparison(
                plan,
                out,
                on_block=lambda model, done, _: progress.update(bar, description=model, completed=done),
            )
            progress.update(bar, completed=len(names) * rounds)
    except (PayloadError, ServerError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        console.print("\nstopped; the services of this comparison are gone, and nothing was written but their logs")
        raise typer.Exit(130) from None
    report.write_json(comparison, out / "results.json")
    report.write_html(comparison, out / "report.html")
    Console(width=max(140, Console().width)).print(report.table(comparison))
    typer.echo(f"report: {out / 'report.html'}")


@app.command()
def limit(
    repository: Annotated[Path, typer.Option(help="Folder of bundles.")],
    model: Annotated[str, typer.Option(help="Name; its newest version is measured.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md, results.json and server logs.")] = Path(
        "results/limit"
    ),
    data: _Data = None,
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
    service_args: _ServiceArgs = "",
    command: _Command = None,
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
        _fail(f"--connections {connections!r}: give whole numbers from 1 on, separated by commas")
    said = command or _this_command()
    arguments = tuple(shlex.split(service_args))
    _end_as_if_interrupted()
    try:
        if soak is None:
            plan = LimitPlan(
                repository=repository,
                model=model,
                data=data,
                rounds=rounds,
                seconds=seconds,
                warmup_seconds=warmup,
                connections=loops,
                share=load,
                service_arguments=arguments,
            )
            _limit(plan, out, said)
        else:
            _soak(repository, model, data, requests=soak, arguments=arguments, command=said, out=out)
    except (PayloadError, ServerError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        console.print("\nstopped; the servers of this measurement are gone, and nothing was measured")
        raise typer.Exit(130) from None


@app.command()
def overload(
    repository: Annotated[Path, typer.Option(help="Folder of bundles; all of them are served.")],
    targets: Annotated[str, typer.Option(help="Names of models or families, separated by commas.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md, results.json, overload.svg and server logs.")] = Path(
        "results/overload"
    ),
    data: _Data = None,
    steps: Annotated[str, typer.Option(help="Arrivals a second and seconds: RATE:SECONDS,...")] = "200:8,800:12,200:8",
    deadline_ms: Annotated[float, typer.Option(min=1, help="Of every request.")] = 100.0,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks a target, interleaved.")] = 3,
    service_args: _ServiceArgs = "",
    command: _Command = None,
) -> None:
    """Send more than a model can answer, and see what a fixed model and a family make of it.

    An open loop of Poisson arrivals; latency counts from the moment at which a request was due.

    Example: `python -m loadtests overload --repository models --targets cifar100-mha,cifar100`
    """
    try:
        parsed = parse_steps(steps)
    except ValueError:
        _fail(f"--steps {steps!r}: give RATE:SECONDS, separated by commas, such as 200:8,800:12,200:8")
    plan = OverloadPlan(
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
    _end_as_if_interrupted()
    try:
        with _progress() as progress:
            bar = progress.add_task("starting", total=total)
            blocks = run_overload(
                plan, out, on_block=lambda name, done, _: progress.update(bar, description=name, completed=done)
            )
            progress.update(bar, completed=total)
    except (PayloadError, ServerError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        console.print("\nstopped; the services of this measurement are gone, and nothing was written but their logs")
        raise typer.Exit(130) from None
    said = command or _this_command()
    found = overload_report.results(plan, blocks)
    about = {"command": said, **environment()}
    table = overload_report.markdown(found)
    (out / "results.json").write_text(
        json.dumps(overload_report.as_json(plan, blocks, found, about), indent=1) + "\n", encoding="utf-8"
    )
    facts = "".join(f"- {name}: {value}\n" for name, value in about.items())
    (out / "report.md").write_text(f"# A step overload\n\n{table}\n{facts}", encoding="utf-8")
    overload_report.plot(plan, blocks, out / "overload.svg")
    typer.echo(table)
    typer.echo(f"report: {out / 'report.md'}")


def _limit(plan: LimitPlan, out: Path, command: str) -> None:
    console.print(f"{plan.total()} measurements, about {plan.estimated_seconds() / 60:.1f} minutes")
    results = Results(plan=plan, command=command, environment=environment())
    code = 0
    try:
        with _progress() as progress:
            bar = progress.add_task("starting", total=plan.total())
            measure(
                plan, out, results, on_step=lambda what, done: progress.update(bar, description=what, completed=done)
            )
            progress.update(bar, completed=plan.total())
    except (KeyboardInterrupt, ServerError) as error:
        if not (results.drives or results.limits):
            raise
        if isinstance(error, ServerError):
            code, results.ended_early = 1, "a server failed"
            console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
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
    with _progress() as progress:
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


def _this_command() -> str:
    return shlex.join(["python", "-m", "loadtests", *sys.argv[1:]])


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def _end_as_if_interrupted() -> None:
    """A terminated measurement must take its servers along, as an interrupted one does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _fail(message: str) -> NoReturn:
    console.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m loadtests")
