"""`python -m loadtests compare`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from loadtests.compare.compare import Asked
from loadtests.compare.compare import compare as run_comparison
from loadtests.experiment.arms import ArmError, parse_arms, repeated, resolved
from loadtests.experiment.command import (
    Command,
    Data,
    Repository,
    ServiceArgs,
    console,
    end_as_if_interrupted,
    fail,
    progress_bar,
    this_command,
    warn,
)
from loadtests.experiment.environment import environment
from loadtests.experiment.model import Comparison, Plan
from loadtests.experiment.schedule import Costs, fitted
from loadtests.experiment.server import ServerError
from loadtests.experiment.store import Store, StoreError
from loadtests.generator.load_result import Protocol
from loadtests.generator.payloads import DEFAULT_SIZES, Payload, PayloadError, describe, parse_sizes, read_payloads
from loadtests.report import regress
from loadtests.report.document import ResultsError, read_results
from loadtests.report.rendering import print_tables
from loadtests.report.report import write_comparison

DEFAULT_ROUNDS = 10
_QUICK_ROUNDS, _QUICK_SECONDS = 3, 3.0
_REGRESSED = 3
"""Exit code."""


def compare(
    models: Annotated[
        str,
        typer.Option(
            help="What to compare, separated by commas; the first is the baseline. NAME is a model of the repository, "
            "NAME?max_batch=1 the same with a setting of the service, NAME@http://HOST:PORT a server that runs "
            "already, NAME@git:COMMIT the service of another commit."
        ),
    ],
    repository: Repository = Path("models"),
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, report.md, results.json, samples.npz, plots and server logs.")
    ] = Path("results/compare"),
    data: Data = None,
    sizes: Annotated[
        str | None, typer.Option(help="Of generated JPEGs, with weights: '640x480:3,1920x1080:1'. [640x480]")
    ] = None,
    protocol: Annotated[Protocol, typer.Option(help="v1 sends image files, v2 binary tensors.")] = "v1",
    connections: Annotated[
        int, typer.Option(min=1, help="Concurrent requests of the closed loop, enough to saturate the server.")
    ] = 16,
    load: Annotated[
        str,
        typer.Option(help="Rates of the two open loops, as fractions of the slowest arm's throughput at saturation."),
    ] = "0.3,0.7",
    rounds: Annotated[
        int, typer.Option(min=2, help="Rounds; each holds one block of every arm, interleaved.")
    ] = DEFAULT_ROUNDS,
    seconds: Annotated[
        float | None,
        typer.Option(min=1, help="Measured seconds of each of a block's three loads. [fitted to the budget]"),
    ] = None,
    warmup: Annotated[float, typer.Option(min=0, help="Seconds dropped at the start of each load.")] = 1.0,
    budget_minutes: Annotated[float, typer.Option(min=0.5, help="The plan is made to fit in this time.")] = 30.0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A preview: 3 short rounds and no capacity search; the report says so.")
    ] = False,
    aa_run: Annotated[
        bool, typer.Option("--aa-run/--no-aa-run", help="Measure the baseline twice (A/A), to show the noise.")
    ] = True,
    objective_ms: Annotated[
        float | None,
        typer.Option(min=0.1, help="Latency to keep, for the largest rate. [connections / saturated rate]"),
    ] = None,
    objective_percentile: Annotated[float, typer.Option(min=50, max=99.9, help="By this part of the images.")] = 99.0,
    capacity_searches: Annotated[int, typer.Option(min=0, help="Searches for that rate, per arm; 0 for none.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals, order of blocks and order of images.")] = 0,
    against: Annotated[
        Path | None,
        typer.Option(help="An earlier results.json: exit with 3 if an arm has become worse than it was then."),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="How much worse --against lets pass.")] = 0.05,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Drop what an interrupted comparison has left in --out.")
    ] = False,
    service_args: ServiceArgs = "",
    command: Command = None,
) -> None:
    """Compare models, precisions, servers or commits: speed, latency, memory and accuracy, with intervals.

    Every arm is measured in blocks, interleaved at random (A B B A), each in a fresh server process: two open loops of
    Poisson arrivals at rates that are the same for all arms, where latency counts from the moment at which an image
    was due, and a closed loop that saturates the server. An interrupted comparison goes on when the same is asked
    again.

    Example: `python -m loadtests compare --models cifar100-mha,cifar100-csra-r2 --data DIR`
    """
    if sizes and data:
        fail("--sizes is of generated images: it does not go with --data")
    try:
        arms = tuple(resolved(arm) for arm in parse_arms(models))
        load_fractions = _load_fractions(load)
        payloads = read_payloads(data, seed=seed, sizes=parse_sizes(sizes) if sizes else DEFAULT_SIZES)
        former = read_results(against) if against else None
    except (ArmError, PayloadError, ResultsError, ValueError) as problem:
        fail(str(problem))
    if aa_run:
        arms = (*arms, repeated(arms[0]))
    plan = Plan(
        repository=repository,
        arms=arms,
        data=data,
        protocol=protocol,
        connections=connections,
        seconds=seconds or (_QUICK_SECONDS if quick else 0.0),
        warmup_seconds=warmup,
        rounds=min(rounds, _QUICK_ROUNDS) if quick else rounds,
        default_rounds=DEFAULT_ROUNDS,
        load_fractions=load_fractions,
        objective_ms=objective_ms or 0.0,
        objective_percentile=objective_percentile,
        capacity_searches=0 if quick else capacity_searches,
        budget_minutes=budget_minutes,
        service_arguments=tuple(shlex.split(service_args)),
        seed=seed,
    )
    guess = fitted(plan, Costs(), seconds=plan.seconds or None)
    console.print(
        f"{len(arms)} arms, {guess.rounds} rounds: about {Costs().whole(guess) / 60:.0f} minutes; "
        "a better estimate follows when each has been tried once"
    )
    comparison = Comparison(
        plan=plan,
        command=command or this_command(),
        environment=environment(),
        payloads=describe(payloads, data),
    )
    out.mkdir(parents=True, exist_ok=True)
    asked = Asked(seconds=plan.seconds or None, objective_ms=objective_ms, rates=former.rates if former else None)
    code = _run(comparison, payloads, out, asked=asked, fresh=fresh)
    report = write_comparison(comparison, out)
    print_tables(report.table, width=140)
    for caveat in report.caveats:
        warn(caveat)
    typer.echo(f"report: {out / 'report.html'}")
    if comparison.ended_early is None:
        Store(out / "blocks").clear()
    if any(block.failure for block in comparison.blocks) or any(
        search.failed for search in comparison.capacity_searches
    ):
        code = code or 1
    if former is not None and not _compared(former, comparison, tolerance):
        code = code or _REGRESSED
    raise typer.Exit(code)


def _run(comparison: Comparison, payloads: list[Payload], out: Path, *, asked: Asked, fresh: bool) -> int:
    end_as_if_interrupted()
    try:
        with progress_bar() as progress:
            bar = progress.add_task("starting", total=None)

            def on_step(what: str, done: int, total: int) -> None:
                progress.update(bar, description=what, completed=done, total=total)

            def on_plan(plan: Plan, left: float) -> None:
                progress.console.print(_settled(plan, comparison.rates, left))

            run_comparison(
                comparison,
                payloads,
                out,
                asked=asked,
                fresh=fresh,
                on_step=on_step,
                on_plan=on_plan,
            )
            progress.update(bar, completed=progress.tasks[0].total)
    except (ArmError, PayloadError, ServerError, StoreError) as problem:
        fail(str(problem))
    except KeyboardInterrupt:
        if not comparison.blocks:
            console.print("\nstopped; its servers are gone, and no block was measured")
            raise typer.Exit(130) from None
        comparison.ended_early = "interrupted"
        console.print("\nstopped; its servers are gone. The same command goes on; this is what it did until now:")
        return 130
    return 0


def _settled(plan: Plan, rates: dict[str, float], left: float) -> str:
    loops = " and ".join(f"{rate:g}/s" for rate in rates.values())
    return (
        f"{plan.rounds} rounds of {len(plan.arms)} arms, {plan.seconds:g} s for each load: open loops at "
        f"{loops}, closed loop with {plan.connections} connections; p{plan.objective_percentile:g} to keep: "
        f"{plan.objective_ms:g} ms; about {left / 60:.0f} minutes left"
    )


def _load_fractions(text: str) -> tuple[float, float]:
    try:
        moderate, high = (float(word) for word in text.split(","))
    except ValueError:
        moderate = high = 0.0
    if not 0 < moderate < high:
        raise ValueError(f"--load {text!r}: give two numbers, the smaller first, such as 0.3,0.7")
    return moderate, high


def _compared(former: Comparison, comparison: Comparison, tolerance: float) -> bool:
    """Whether nothing became worse; what did is told."""
    for note in regress.notes(former, comparison):
        warn(note)
    found = regress.regressions(former, comparison, tolerance=tolerance)
    for regression in found.worse:
        console.print(f"[red]worse than before:[/] {escape(str(regression))}", highlight=False, soft_wrap=True)
    if not found.tests:
        fail("nothing could be compared with --against: the notes say why")
    if not found.worse:
        console.print(f"of {found.tests} metrics none is worse than before by more than {tolerance:.0%}")
    return not found.worse
