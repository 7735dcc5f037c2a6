"""`python -m loadtests`: which model to run, at which load, and at what cost."""

import typer

from loadtests.accuracy.cli import accuracy
from loadtests.capacity.cli import capacity
from loadtests.compare.cli import compare
from loadtests.faults.cli import faults
from loadtests.fronts.cli import fronts_command
from loadtests.limit.cli import limit
from loadtests.mlperf.cli import mlperf
from loadtests.overload.cli import overload
from loadtests.rollout.cli import rollout
from loadtests.soak.cli import soak

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Find out which model to run, at which load, and at what cost in accuracy and memory.

    `compare` and `accuracy` decide between models; `limit`, `overload`, `soak` and `faults` test the service itself;
    `fronts` and `capacity` size several workers and machines, `rollout` reads what a shadow or a canary shows; `mlperf`
    lets MLPerf LoadGen drive it. To load any server by hand, with Locust's web page or from several machines, see
    `loadtests/generator/locustfile.py`.""",
)
for command in (compare, accuracy, limit, overload, soak, faults, rollout, mlperf, capacity):
    app.command()(command)
app.command("fronts")(fronts_command)


if __name__ == "__main__":
    app(prog_name="python -m loadtests")
