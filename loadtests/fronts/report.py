"""What `stridevit loadtest fronts` found: the table of fronts, and the queueing model against the open loop."""

from pathlib import Path

from loadtests.fronts.figures import Figure, FrontResult, results, sizing_figures
from loadtests.fronts.measure import FrontsExperiment
from loadtests.fronts.model_check import Checked, checked
from loadtests.report.document import conditions, write_experiment
from loadtests.report.rendering import Table, print_tables, tables


def tables_of(experiment: FrontsExperiment) -> list[Table]:
    """As `fronts_tables.txt.j2` lays them out."""
    return tables(
        "fronts_tables.txt.j2",
        title=_conditions(experiment),
        results=results(experiment),
        checks=checked(experiment),
        skipped=experiment.plan.skipped,
    )


def write(experiment: FrontsExperiment, out: Path) -> Path:
    """Write `report.md` and `results.json` in the folder `out`, print the tables, and return the report's path."""
    found = tables_of(experiment)
    write_experiment(
        experiment,
        out,
        template="fronts.md.j2",
        figures={
            "sizing": sizing_figures(experiment),
            "fronts": [_result(one) for one in results(experiment)],
            "model_check": [_check(one) for one in checked(experiment)],
        },
        conditions=_conditions(experiment),
        tables=found,
        workers=experiment.plan.workers,
    )
    print_tables(*found, width=170)
    return out / "report.md"


def _conditions(experiment: FrontsExperiment) -> str:
    plan = experiment.plan
    measured = max((len(experiment.blocks_of(arm.label)) for arm in plan.arms), default=0)
    once = ", each front started once" if plan.start_once else ""
    what = (
        f"{plan.arms[0].model} behind each front with {plan.workers} workers, {plan.seconds:g} s per load after "
        f"{plan.warmup_seconds:g} s of warm-up, {measured} rounds measured{once}"
    )
    return conditions(experiment, what)


def _result(one: FrontResult) -> dict[str, object]:
    return {**vars(one), "figures": {name: _figure(figure) for name, figure in one.figures.items()}}


def _check(one: Checked) -> dict[str, object]:
    return {name: _figure(value) if isinstance(value, Figure) else value for name, value in vars(one).items()}


def _figure(figure: Figure) -> dict[str, object]:
    return {"mean": figure.mean, "interval": figure.interval, "rounds": figure.rounds, "pooled": figure.pooled}
