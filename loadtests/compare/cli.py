"""The command `compare`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from loadtests.compare.compare import compare as run_comparison
from loadtests.errors import LoadTestError
from loadtests.experiment import command as cli
from loadtests.experiment.arms import parse_arms, repeated
from loadtests.experiment.environment import this_command
from loadtests.experiment.model import Comparison, ComparisonPlan
from loadtests.experiment.run import Bench
from loadtests.experiment.schedule import Costs, fitted
from loadtests.generator.load_result import Protocol
from loadtests.generator.payloads import DEFAULT_SIZES, describe, parse_sizes, read_payloads
from loadtests.report import regressions
from loadtests.report.document import read_results
from loadtests.report.rendering import print_tables
from loadtests.report.report import write_comparison

DEFAULT_ROUNDS = 10
_REGRESSED = 3
"""Exit code."""


def compare(
    models: Annotated[
        str,
        typer.Option(
            help="What to compare, separated by commas; the first is the baseline. NAME is a model of the repository, "
            "NAME?max_batch=1 the same with a setting of the service, NAME@http://HOST:PORT a server that already "
            "runs, NAME@git:COMMIT the service of another commit with its own models."
        ),
    ],
    repository: cli.Repository = Path("models"),
    out: cli.Out = Path("results/compare"),
    data: cli.Data = None,
    sizes: Annotated[
        str | None, typer.Option(help="Sizes of generated JPEGs, with weights: '640x480:3,1920x1080:1'. [640x480]")
    ] = None,
    protocol: Annotated[Protocol, typer.Option(help="v1 sends image files, v2 binary tensors.")] = "v1",
    connections: Annotated[int, typer.Option(min=1, help="Connections of the closed loop.")] = 16,
    load: Annotated[
        str, typer.Option(help="Rates of the two open loops, as fractions of the slowest arm's saturated throughput.")
    ] = "0.3,0.7",
    rounds: cli.Rounds = DEFAULT_ROUNDS,
    seconds: Annotated[
        float | None,
        typer.Option(min=1, help="Measured seconds of each of a block's three loads. [fitted to the budget]"),
    ] = None,
    warmup: cli.Warmup = 1.0,
    budget_minutes: Annotated[float, typer.Option(min=0.5, help="Time to which the plan is fitted.")] = 30.0,
    quick: Annotated[bool, typer.Option("--quick", help="A preview: 3 short rounds and no capacity search.")] = False,
    aa_run: Annotated[bool, typer.Option(help="Measure the baseline twice (A/A), to show the machine's noise.")] = True,
    objective_ms: Annotated[
        float | None,
        typer.Option(min=0.1, help="Latency objective of the capacity search. [connections / slowest throughput]"),
    ] = None,
    objective_percentile: Annotated[
        float, typer.Option(min=50, max=99.9, help="Percentage of the images that must meet the objective.")
    ] = 99.0,
    capacity_searches: Annotated[
        int, typer.Option(min=0, help="Searches, per arm, for the largest rate that meets the objective; 0 for none.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed for arrivals, order of blocks and order of images.")] = 0,
    against: Annotated[
        Path | None, typer.Option(help="An earlier results.json: exit with 3 if an arm has become worse since.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Relative change that --against allows: 0.05 is 5 %.")] = 0.05,
    fresh: cli.Fresh = False,
    service_args: cli.ServiceArgs = "",
    command: cli.Command = None,
) -> None:
    """Compare models, precisions, servers or commits: speed, latency, memory and accuracy, with intervals.

    Every arm is measured in blocks, interleaved at random (A B B A), each with a fresh server process: two open loops
    of Poisson arrivals at rates that are the same for all arms, where latency counts from the moment at which an image
    was due, and a closed loop that saturates the server. The same command resumes an interrupted comparison.

    Exit code 1 if a block failed, or nothing could be compared with --against; 3 if something has become worse.

    Example: `stridevit compare --models cifar100-mha,cifar100-csra-r2 --data DIR`
    """
    if quick:
        rounds, seconds, capacity_searches = min(rounds, 3), seconds or 3.0, 0
    if sizes and data:
        cli.fail("--sizes describes generated images: it does not go with --data")
    try:
        arms = parse_arms(models)
        load_fractions = _load_fractions(load)
        payloads = read_payloads(data, seed=seed, sizes=parse_sizes(sizes) if sizes else DEFAULT_SIZES)
        former = read_results(against) if against else None
    except (LoadTestError, ValueError) as problem:
        cli.fail(str(problem))
    plan = ComparisonPlan(
        repository=repository,
        arms=(*arms, repeated(arms[0])) if aa_run else arms,
        data=data,
        protocol=protocol,
        connections=connections,
        seconds=seconds or 0.0,
        warmup_seconds=warmup,
        rounds=rounds,
        default_rounds=DEFAULT_ROUNDS,
        load_fractions=load_fractions,
        objective_ms=objective_ms or 0.0,
        objective_percentile=objective_percentile,
        capacity_searches=capacity_searches,
        budget_minutes=budget_minutes,
        service_arguments=tuple(shlex.split(service_args)),
        seed=seed,
    )
    guess = fitted(plan, Costs())
    cli.console.print(
        f"{len(plan.arms)} arms, {guess.rounds} rounds: about {Costs().whole(guess) / 60:.0f} minutes; "
        "a better estimate follows when each arm has been tried once"
    )
    comparison = Comparison(plan=plan, command=command or this_command(), payloads=describe(payloads, data))
    if former:
        comparison.rates = former.rates
    bench = Bench(comparison, payloads, out)
    code = cli.run_measurement(
        comparison,
        lambda progress: run_comparison(bench, comparison, progress, fresh=fresh),
        report=lambda: _report(comparison, out),
        store=bench.store,
    )
    failed = bool(comparison.failures) or any(search.failed for search in comparison.capacity_searches)
    worse = comparison.measured and former is not None and not _compared(former, comparison, tolerance)
    raise typer.Exit(code or int(failed) or _REGRESSED * worse)


def _report(comparison: Comparison, out: Path) -> Path:
    report = write_comparison(comparison, out)
    print_tables(report.table, width=140)
    for caveat in report.caveats:
        cli.warn(caveat)
    return out / "report.html"


def _load_fractions(text: str) -> tuple[float, float]:
    try:
        moderate, high = (float(word) for word in text.split(","))
    except ValueError:
        moderate = high = 0.0
    if not 0 < moderate < high:
        raise ValueError(f"--load {text!r}: give two numbers, the smaller first, such as 0.3,0.7")
    return moderate, high


def _compared(former: Comparison, comparison: Comparison, tolerance: float) -> bool:
    """Whether nothing has become worse; prints what has."""
    for note in regressions.notes(former, comparison):
        cli.warn(note)
    found = regressions.find_regressions(former, comparison, tolerance=tolerance)
    for row in found.worse:
        said = escape(regressions.sentence(row))
        cli.console.print(f"[red]worse than before:[/] {said}", highlight=False, soft_wrap=True)
    if not found.tests:
        cli.fail("nothing could be compared with --against: the notes say why")
    if not found.worse:
        cli.console.print(f"of {found.tests} metrics none is worse than before by more than {tolerance:.0%}")
    return not found.worse
