"""What `stridevit loadtest soak` found: memory from first to last, trends, and what became of numbered requests."""

from pathlib import Path
from typing import Any

from loadtests.faults.client import Outcome
from loadtests.report.document import conditions, write_experiment
from loadtests.report.rendering import UNKNOWN, Table, number, print_tables
from loadtests.soak.soak import CONNECTIONS, SoakExperiment, SoakPlan, figures
from loadtests.soak.watch import Trend, trends


def write(experiment: SoakExperiment, out: Path) -> Path:
    """Write report.md and results.json in `out`, print the figures, and return the report's path."""
    (block,), plan = experiment.blocks, experiment.plan
    info, found = block.info, figures(block.info["samples"])
    over = trends(info["samples"])
    what = conditions(experiment, f"{block.arm}: {_sent(plan, info)}")
    names = {
        "idle_bytes": "fresh process",
        "first_bytes": "first tenth of the requests, median",
        "last_bytes": "last tenth of the requests, median",
        "peak_bytes": f"largest of {len(info['samples'])} samples",
    }
    rows = [(title, f"{found[name] / 1e6:.1f} MB") for name, title in names.items()]
    rows.append(("growth from the first to the last tenth", f"{found['growth']:+.2%}"))
    memory = Table(title=what, headings=("memory (PSS of the process tree)", ""), rows=rows)
    shown = [memory, _trend_table(over), *([_outcome_table(info)] if "counts" in info else [])]
    asked = {"model": block.arm, "planned_requests": plan.requests, "trends": over}
    write_experiment(
        experiment,
        out,
        template="soak.md.j2",
        figures={**asked, **info, **found},
        summary=what,
        tables=shown,
        broken=broken(experiment),
        notes=info.get("notes", []),
    )
    print_tables(*shown, width=100)
    return out / "report.md"


def broken(experiment: SoakExperiment) -> list[str]:
    """What a run with numbered images found wrong, in words."""
    info = experiment.blocks[0].info if experiment.blocks else {}
    counts = info.get("counts", {})
    found = [f"{counts[name]} requests {name}" for name in (Outcome.SWAPPED, Outcome.LOST) if counts.get(name)]
    if info.get("exit_codes"):
        found.append(f"the process ended with {', '.join(map(str, info['exit_codes']))}")
    return [*found, *info.get("unmet", [])]


def _sent(plan: SoakPlan, info: dict[str, Any]) -> str:
    if "counts" not in info:
        return f"{info['requests']:,} requests over {CONNECTIONS} connections, {info['failed_requests']} of them failed"
    loop = f"an open loop of {plan.rate:g} a second" if plan.rate else f"a closed loop of {CONNECTIONS} connections"
    return f"{sum(info['counts'].values()):,} numbered requests, {loop}"


def _trend_table(found: list[Trend]) -> Table:
    return Table(
        title="Trends",
        headings=("quantity", "first tenth", "last tenth", "slope per hour", "95 % interval"),
        rows=[
            (
                trend.name,
                number(trend.first),
                number(trend.last),
                _signed(trend.per_hour),
                UNKNOWN if trend.low is None else f"{_signed(trend.low)} to {_signed(trend.high)}",
            )
            for trend in found
        ],
        note="Least squares over the means of ten equal parts of the time, without its first tenth; Student's t.",
    )


def _outcome_table(info: dict[str, Any]) -> Table:
    counts = info["counts"]
    return Table(
        title="Numbered requests",
        headings=("outcome", "requests"),
        rows=[(str(outcome), f"{counts.get(outcome, 0):,}") for outcome in Outcome],
    )


def _signed(value: float | None) -> str:
    return UNKNOWN if value is None else f"{'+' if value > 0 else ''}{number(value)}"
