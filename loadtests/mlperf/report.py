"""What MLPerf LoadGen found: its verdict in its own words, as tables for page and terminal, and as JSON."""

from pathlib import Path
from typing import Any

from loadtests.experiment.json_files import to_json
from loadtests.mlperf.run import MlperfRun, Scenario, ScenarioRun
from loadtests.report.rendering import UNKNOWN, Cell, Table, print_tables, write_report

HEADLINES: dict[Scenario, str] = {
    "SingleStream": "90.0th percentile latency (ns)",
    "Offline": "Samples per second",
    "Server": "Completed samples per second",
}
"""LoadGen's name of each scenario's metric."""
_RATES = ("Samples per second", "Completed samples per second", "QPS w/ loadgen overhead")
_PERCENTILES = {f"p{rank}_ms": f"{rank}.00 percentile latency (ns)" for rank in (50, 90, 95, 99)}
_SHOWN = ("p50_ms", "p90_ms", "p99_ms")


def write(results: MlperfRun, out: Path) -> Path:
    """Write report.md and results.json, print the table, and return the report's path."""
    runs = table(results)
    facts = {
        "images": results.payloads,
        "LoadGen": results.runs[0].client["loadgen"],
        "model": _model(results.runs[0].model),
        "setting": "full" if results.plan.full else "quick",
        "finished": results.finished.isoformat(timespec="seconds") if results.finished else "no",
    }
    write_report(
        out,
        document=as_json(results),
        template="mlperf.md.j2",
        command=results.command,
        environment={**facts, **results.environment},
        notes=notes(results),
        runs=runs,
        accuracy=results.plan.accuracy,
        scenarios=results.runs,
    )
    print_tables(runs, width=150)
    return out / "report.md"


def notes(results: MlperfRun) -> list[str]:
    """What must be said with the figures, most important first."""
    found = []
    if results.ended_early:
        found.append(f"The run ended early: {results.ended_early}. The figures are of the scenarios that had finished.")
    for run in results.runs:
        if run.failed:
            message, count = max(run.client["failures"].items(), key=lambda item: item[1])
            found.append(
                f"{run.scenario}: {run.failed:,} of {run.failed + run.answered:,} requests failed ({count:,} with: "
                f"{message}). LoadGen cannot be told of failures and counts them as answered: its figures and its "
                "verdict are not those of a service that works."
            )
    where = "the machine of this command" if results.plan.url else "the same machine as the service"
    found.append(
        "This is no MLPerf result: MLCommons has not verified it, the model is none of MLPerf's benchmarks, and "
        f"LoadGen ran on {where}."
    )
    lacking = [f"{run.scenario} ({'; '.join(short)})" for run in results.runs if (short := unmet(run))]
    if lacking and not results.plan.accuracy:
        found.append(
            "The verdict is LoadGen's for the settings it was given. They fall short of what MLPerf demands for image "
            f"classification: {', '.join(lacking)}."
        )
    remarks = [f"{run.scenario}: {remark}" for run in results.runs for remark in run.summary.remarks]
    return found + [remark for remark in remarks if ": No " not in remark]


def unmet(run: ScenarioRun) -> list[str]:
    """The settings in which a run fell short of MLPerf's own for image classification."""
    used, rules = run.summary.parameters, run.client["rules"]
    if not used:
        return []
    offline = run.scenario == "Offline"
    queries = float(used["samples_per_query" if offline else "min_query_count"])
    minimums = [
        ("s at least", float(used["min_duration (ms)"]) / 1000, rules["min_duration_s"]),
        ("samples" if offline else "queries at least", queries, rules["min_query_count"]),
        ("images in memory", float(used["performance_sample_count"]), rules["performance_sample_count"]),
    ]
    found = [f"{value:,.0f} instead of {rule:,.0f} {what}" for what, value, rule in minimums if value < rule]
    bound = rules.get("target_latency_ms")
    if bound is not None and (used_ms := float(used["target_latency (ns)"]) / 1e6) > bound:
        found.append(f"a bound of {used_ms:g} ms instead of {bound:g} ms")
    return found


def as_json(results: MlperfRun) -> dict[str, Any]:
    """Everything, including LoadGen's own values."""
    return {
        "schema_version": 2,
        **results.facts(),
        "plan": results.plan,
        "notes": notes(results),
        "failed": results.failed,
        "runs": [_run_as_json(run) for run in results.runs],
    }


def _run_as_json(run: ScenarioRun) -> dict[str, Any]:
    number = run.summary.number
    return {
        **run.client,
        **{name: value for name, value in to_json(run).items() if name != "client"},
        "verdict": run.summary.verdict,
        "failed": run.failed,
        "samples_per_second": next((rate for name in _RATES if (rate := number(name))), None),
        **{name: number(key) for name, key in _PERCENTILES.items()},
        "top1": run.top1,
        "unmet": unmet(run),
    }


def table(results: MlperfRun) -> Table:
    """One row per scenario."""
    latencies = [name.replace("_", " ") for name in _SHOWN]
    measured = ["mode", "top-1", "labelled"] if results.plan.accuracy else ["verdict", "LoadGen's metric", *latencies]
    return Table(
        title="MLPerf LoadGen",
        headings=("scenario", *measured, "answered", "failed", "LoadGen's cores"),
        rows=[
            (
                run.scenario,
                *(_accuracy_cells(run) if results.plan.accuracy else _performance_cells(run)),
                f"{run.answered:,}",
                Cell(f"{run.failed:,}", "worse" if run.failed else None),
                f"{run.client['generator_cores']:.2f}",
            )
            for run in results.runs
        ],
        text=(0, 1),
    )


def _accuracy_cells(run: ScenarioRun) -> list[str]:
    return [run.mode, UNKNOWN if run.top1 is None else f"{run.top1:.4f}", f"{run.labelled:,}"]


def _performance_cells(run: ScenarioRun) -> list[str]:
    name, number = HEADLINES[run.scenario], run.summary.number
    value, unit = number(name), " ms" if name.endswith("(ns)") else ""
    headline = UNKNOWN if value is None else f"{name.removesuffix(' (ns)')} {value:,.2f}{unit}"
    # Those of Offline, which is one query, would only tell how long the run was.
    values = [None if run.scenario == "Offline" else number(_PERCENTILES[shown]) for shown in _SHOWN]
    latencies = [UNKNOWN if value is None else f"{value:.2f}" for value in values]
    return [run.summary.verdict or UNKNOWN, headline, *latencies]


def _model(model: dict[str, Any]) -> str:
    manifest = model.get("manifest")
    if not manifest:
        return "a family, or unknown to the service"
    accuracy = manifest.get("accuracy")
    top1 = f"top-1 {accuracy['top1']} on {accuracy['dataset']}" if accuracy else "accuracy unknown"
    return f"{manifest.get('name')} version {model.get('version')}, {manifest.get('precision')}, {top1}"
