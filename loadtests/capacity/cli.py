"""The command `capacity`."""

from pathlib import Path
from typing import Annotated

import typer

from loadtests.capacity.report import figures_of, table_of
from loadtests.capacity.sizing import Machine, Needs, Target, needs
from loadtests.errors import LoadTestError
from loadtests.experiment import command as cli
from loadtests.report.rendering import print_tables

_GB = 1e9


def capacity(
    fronts: Annotated[Path, typer.Option(help="The results.json of `loadtest fronts`.")] = Path(
        "results/bench-fronts/results.json"
    ),
    front: Annotated[str, typer.Option(help="Which front's figures to take.")] = "Envoy",
    rates: Annotated[str, typer.Option(help="Requests per second, separated by commas.")] = "100,1000,10000,100000",
    p99_ms: Annotated[float, typer.Option("--p99-ms", min=0.1, help="What 99 % of the requests may take.")] = 100.0,
    highest_load: Annotated[
        float, typer.Option(min=0.05, max=0.95, help="Part of the workers' cores that may be in use, whatever the p99.")
    ] = 0.8,
    spare: Annotated[int, typer.Option(min=0, help="Number of machines that may fail.")] = 1,
    cores: Annotated[int, typer.Option(min=1, help="Cores of a machine.")] = 32,
    memory_gb: Annotated[float, typer.Option("--memory-gb", min=0.1, help="Memory of a machine.")] = 128.0,
    network_gbits: Annotated[
        float, typer.Option("--network-gbits", min=0.01, help="Network of a machine, in each direction.")
    ] = 25.0,
    cores_per_worker: Annotated[int, typer.Option(min=1, max=64, help="Cores of a worker.")] = 4,
    figure: Annotated[
        list[str] | None,
        typer.Option(help="A figure of your own in place of a measured one: worker_cpu_ms=40; may be repeated."),
    ] = None,
) -> None:
    """Say how many workers, cores, machines and balancers a rate needs, from what `loadtest fronts` has measured.

    Each worker is modelled as an M/D/c queue to which requests are assigned at random: c cores, and the measured CPU
    time for each request. The tail of the wait follows exactly from that. Everything beyond the measured machine is
    computed, not measured.

    Example: `stridevit loadtest capacity --rates 500,5000 --p99-ms 50 --cores 64`; for a model whose request takes
    40 ms: `stridevit loadtest capacity --figure worker_cpu_ms=40 --figure alone_ms=25`
    """
    machine = Machine(
        cores=cores,
        memory_bytes=memory_gb * _GB,
        network_gbits=network_gbits,
        cores_per_worker=cores_per_worker,
    )
    found: list[Needs] = []
    try:
        figures = figures_of(fronts, front, figure or ())
        for rate in _rates(rates):
            target = Target(rate=rate, p99_ms=p99_ms, highest_load=highest_load, spare=spare)
            found.append(needs(figures, machine, target))
    except LoadTestError as problem:
        cli.fail(str(problem))
    print_tables(table_of(figures, machine, found), width=150)


def _rates(text: str) -> list[float]:
    try:
        found = [float(word) for word in cli.names(text)]
    except ValueError:
        found = []
    if not found:
        cli.fail(f"--rates {text!r}: give numbers separated by commas, such as 100,1000")
    return found
