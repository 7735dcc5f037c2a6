"""What MLPerf LoadGen found: its verdict in its own words, as tables for page and terminal, and as JSON."""

from pathlib import Path
from typing import Any

from loadtests.experiment.json_files import to_json
from loadtests.mlperf.run import MlperfRun, Scenario, ScenarioRun
from loadtests.report.rendering import UNKNOWN, Cell, Table, write_report

HEADLINES: dict[Scenario, str] = {
    "SingleStream": "90.0th percentile latency (ns)",
    "Offline": "Samples per second",
    "Server": "Completed samples per second",
}
"""LoadGen's name of each scenario's metric."""
_RATES = ("Samples per second", "Completed samples per second", "QPS w/ loadgen overhead")
_PERCENTILES = {f"p{rank}_ms": f"{rank}.00 percentile latency (ns)" for rank in (50, 90, 95, 99)}
_SHOWN = ("p50_ms", "p90_ms", "p99_ms")


def write(results: MlperfRun, out: Path) -> None:
    """`results.json` and `report.md` in the folder `out`."""
    facts = {
        "images": results.payloads,
        "LoadGen": results.runs[0].loadgen,
        "model": _model(results.runs[0].model),
        "setting": "full" if results.plan.full else "quick",
        **results.environment,
        "finished": results.finished.isoformat(timespec="seconds") if results.finished else "no",
    }
    write_report(
        out,
        document=as_json(results),
        template="mlperf.md.j2",
        command=results.command,
        environment=facts,
        notes=notes(results),
        runs=table(results),
        accuracy=results.plan.accuracy,
        scenarios=results.runs,
    )


def notes(results: MlperfRun) -> list[str]:
    """What must be said with the figures, most important first."""
    found = []
    if results.ended_early:
        found.append(f"The run ended early: {results.ended_early}. The figures are of the scenarios that had finished.")
    for run in results.runs:
        if run.failed:
            message, count = max(run.failures.items(), key=lambda item: item[1])
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
    used, rules = run.summary.parameters, run.rules
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
        "command": results.command,
        "environment": results.environment,
        "plan": results.plan,
        "payloads": results.payloads,
        "notes": notes(results),
        "ended_early": results.ended_early,
        "finished": results.finished.isoformat(timespec="seconds") if results.finished else None,
        "failed": results.failed,
        "runs": [_run_as_json(results, run) for run in results.runs],
    }


def _run_as_json(results: MlperfRun, run: ScenarioRun) -> dict[str, Any]:
    number = run.summary.number
    return {
        **to_json(run),
        "mode": results.plan.mode,
        "verdict": run.summary.verdict,
        "failed": run.failed,
        "samples_per_second": next((rate for name in _RATES if (rate := number(name))), None),
        **{name: number(key) for name, key in _PERCENTILES.items()},
        "top1": run.accuracy.top1 if run.accuracy else None,
        "unmet": unmet(run),
    }


def table(results: MlperfRun) -> Table:
    """One row per scenario."""
    accuracy = results.plan.accuracy
    measured = ("top-1", "labelled") if accuracy else ("LoadGen's metric", *(name.replace("_", " ") for name in _SHOWN))
    return Table(
        title="MLPerf LoadGen",
        headings=(
            "scenario",
            "mode" if accuracy else "LoadGen's verdict",
            *measured,
            "answered",
            "failed",
            "LoadGen's cores",
        ),
        rows=[
            (
                run.scenario,
                results.plan.mode if accuracy else run.summary.verdict or UNKNOWN,
                *(_top1(run) if accuracy else (_headline(run), *_latencies(run))),
                f"{run.answered:,}",
                Cell(f"{run.failed:,}", "worse" if run.failed else None),
                f"{run.generator_cores:.2f}",
            )
            for run in results.runs
        ],
        text=(0, 1),
    )


def _top1(run: ScenarioRun) -> tuple[str, str]:
    if run.accuracy is None or run.accuracy.top1 is None:
        return UNKNOWN, "0"
    return f"{run.accuracy.top1:.4f}", f"{run.accuracy.answered:,}"


def _headline(run: ScenarioRun) -> str:
    name = HEADLINES[run.scenario]
    value = run.summary.number(name)
    if value is None:
        return UNKNOWN
    if name.endswith("(ns)"):
        return f"{name.removesuffix(' (ns)')} {value:.2f} ms"
    return f"{name} {value:,.1f}"


def _latencies(run: ScenarioRun) -> list[str]:
    values = [None if run.scenario == "Offline" else run.summary.number(_PERCENTILES[name]) for name in _SHOWN]
    return [UNKNOWN if value is None else f"{value:.2f}" for value in values]


def _model(model: dict[str, Any]) -> str:
    manifest = model.get("manifest")
    if not manifest:
        return "a family, or unknown to the service"
    accuracy = manifest.get("accuracy")
    top1 = f"top-1 {accuracy['top1']} on {accuracy['dataset']}" if accuracy else "accuracy unknown"
    return f"{manifest.get('name')} version {model.get('version')}, {manifest.get('precision')}, {top1}"
