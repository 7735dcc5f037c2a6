"""The command `faults`."""

import shlex
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from loadtests.experiment import command as cli
from loadtests.experiment.environment import this_command
from loadtests.experiment.model import Arm, Progress
from loadtests.experiment.run import Bench
from loadtests.faults.catalogue import all_faults
from loadtests.faults.measure import FaultRunner
from loadtests.faults.models import make_models
from loadtests.faults.plan import FaultExperiment, FaultPlan
from loadtests.faults.report import write

_OVERHEAD_SECONDS = 12.0
"""For each fault: a start, a stop, and requests that wait."""


def faults(
    only: Annotated[
        str, typer.Option("--faults", help="Names of faults, separated by commas, or `list` to show them. [all]")
    ] = "",
    out: cli.Out = Path("results/faults"),
    rate: Annotated[float, typer.Option(min=1, help="Requests a second of the steady load.")] = 60.0,
    seconds: Annotated[
        float, typer.Option(min=3, help="Seconds of load before and after each fault, and of a lasting fault.")
    ] = 10.0,
    fresh: cli.Fresh = False,
    service_args: cli.ServiceArgs = "",
    command: cli.Command = None,
) -> None:
    """Subject a real service process to one fault after the other, and see what its clients notice.

    Each fault gets a fresh service with a small model that answers with the number in the image, under a steady open
    loop through `/v1` and `/v2` on kept and new connections. The report counts what was answered, refused, failed, lost
    and swapped, and says how long recovery took. Exit code 1 if an answer was swapped, or if a request was lost or the
    process ended under a fault that it must survive. The same command resumes an interrupted measurement.

    Example: `stridevit loadtest faults --faults sigkill,log-unread`
    """
    with tempfile.TemporaryDirectory(prefix="stridevit-faults-") as folder:
        scratch = Path(folder)
        known = all_faults(scratch)
        if only == "list":
            for fault in known.values():
                typer.echo(f"{fault.name:20} {fault.what}")
            raise typer.Exit
        if unknown := [name for name in cli.names(only) if name not in known]:
            cli.fail(f"--faults {','.join(unknown)}: there are {', '.join(known)}")
        chosen = [known[name] for name in cli.names(only) or known]
        reasons = {fault.name: fault.impossible for fault in chosen}
        possible = [fault for fault in chosen if reasons[fault.name] is None]
        plan = FaultPlan(
            repository=out / "models",
            arms=tuple(Arm(label=fault.name, model=fault.model) for fault in possible),
            data=None,
            seconds=seconds,
            rate=rate,
            service_arguments=tuple(shlex.split(service_args)),
            not_run=tuple((name, reason) for name, reason in reasons.items() if reason),
        )
        experiment = FaultExperiment(plan=plan, command=command or this_command(), payloads="numbered images")
        runner = FaultRunner(plan, known, scratch)
        bench = Bench(experiment, (), out, measure=runner.measure, serve=runner.serve)
        minutes = len(possible) * (3 * seconds + _OVERHEAD_SECONDS) / 60
        cli.console.print(f"{len(possible)} faults, about {minutes:.0f} minutes")

        def measure(progress: Progress) -> None:
            make_models(plan.repository)
            with bench.opened(progress, fresh=fresh):
                bench.rounds(lambda _: (), progress)

        code = cli.run_measurement(experiment, measure, report=lambda: write(experiment, out), store=bench.store)
    raise typer.Exit(code or int(bool(experiment.broken)))
