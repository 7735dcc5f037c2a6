"""`python -m loadtests`: which model to run, at which load, at what cost."""

import typer

from loadtests.accuracy.cli import accuracy
from loadtests.compare.cli import compare
from loadtests.limit.cli import limit
from loadtests.mlperf.cli import mlperf
from loadtests.overload.cli import overload

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Find out which model to run, at which load, at what cost in accuracy and memory.

    To drive any server by hand, with Locust's web page or on several machines, see
    `loadtests/generator/locustfile.py`.""",
)
for command in (compare, limit, overload, accuracy, mlperf):
    app.command()(command)


if __name__ == "__main__":
    app(prog_name="python -m loadtests")
