"""What MLPerf LoadGen found: LoadGen's verdict in its own words, as a table, a Markdown page and a JSON file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from loadtests.experiment.json_files import to_json, write_json
from loadtests.mlperf.drive import Results, Run, Scenario

HEADLINES: dict[Scenario, str] = {
    "SingleStream": "90.0th percentile latency (ns)",
    "Offline": "Samples per second",
    "Server": "Completed samples per second",
}
"""LoadGen's name of what a scenario is about."""
_PERCENTILES = {f"p{rank}_ms": f"{rank}.00 percentile latency (ns)" for rank in (50, 90, 95, 99)}
_SHOWN = ("p50_ms", "p90_ms", "p99_ms")


def write(results: Results, out: Path) -> None:
    """Write `results.json` and `report.md`."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(as_json(results), out / "results.json")
    (out / "report.md").write_text(markdown(results), encoding="utf-8")


def table(results: Results) -> Table:
    """For the terminal."""
    drawn = Table(title="MLPerf LoadGen")
    names, *rows = _rows(results)
    for name in names:
        drawn.add_column(name, justify="left" if name in names[:2] else "right")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def notes(results: Results) -> list[str]:
    """What must be said with the figures, most important first."""
    said = []
    if results.ended_early:
        said.append(
            f"The run ended early: {results.ended_early}. What follows is of the scenarios that were over by then."
        )
    for run in results.runs:
        if run.failed:
            words, count = max(run.failures.items(), key=lambda item: item[1])
            said.append(
                f"**{run.scenario}: {run.failed:,} of {run.failed + run.answered:,} requests failed** ({count:,} with: "
                f"{words}). LoadGen cannot be told of failures and counts them as answered: its figures and its "
                "verdict say nothing about a service that works."
            )
    said.append(
        "This is no MLPerf result: MLCommons has not verified it, the model is none of MLPerf's benchmarks, and "
        "LoadGen ran on " + ("the machine of this command." if results.plan.url else "the same machine as the service.")
    )
    lacking = [f"{run.scenario} ({'; '.join(found)})" for run in results.runs if (found := unmet(run))]
    if lacking and not results.plan.accuracy:
        said.append(
            "The verdict is LoadGen's by the settings it was given. They fall short of those that MLPerf asks for in "
            f"image classification: {', '.join(lacking)}."
        )
    said += [f"{run.scenario}: {remark}" for run in results.runs for remark in run.summary.remarks if _alarms(remark)]
    return said


def unmet(run: Run) -> list[str]:
    """In which settings a run fell short of MLPerf's own, as LoadGen carries them for image classification."""
    used, rules = run.summary.parameters, run.rules
    if not used:
        return []
    queries = float(used["samples_per_query" if run.scenario == "Offline" else "min_query_count"])
    pairs = [
        ("s at least", float(used["min_duration (ms)"]) / 1000, rules["min_duration_s"]),
        ("samples" if run.scenario == "Offline" else "queries at least", queries, rules["min_query_count"]),
        ("images in memory", float(used["performance_sample_count"]), rules["performance_sample_count"]),
    ]
    found = [f"{value:,.0f} instead of {rule:,.0f} {what}" for what, value, rule in pairs if value < rule]
    bound = rules.get("target_latency_ms")
    if bound is not None and float(used["target_latency (ns)"]) / 1e6 > bound:
        found.append(f"a bound of {float(used['target_latency (ns)']) / 1e6:g} ms instead of {bound:g} ms")
    return found


def markdown(results: Results) -> str:
    """A page."""
    parts = ["# MLPerf LoadGen over HTTP", *notes(results)]
    if results.runs:
        parts.append(_markdown_table(_rows(results)))
        parts.append(_READING_ACCURACY if results.plan.accuracy else _READING)
    for run in results.runs:
        if run.summary.verdict is not None:
            parts += [f"## {run.scenario}", f"```\n{_verdict(run)}\n```"]
            used = ", ".join(f"{name} {value}" for name, value in run.summary.parameters.items())
            parts.append(f"Settings in force, as LoadGen names them: {used}. Connections: {run.connections}.")
    facts = {
        "command": f"`{results.command}`",
        "images": results.payloads,
        "LoadGen": next((run.loadgen for run in results.runs), "–"),
        "model": _model(results.runs),
        "setting": "full" if results.plan.full else "short",
        **results.environment,
        "finished": results.finished.isoformat(timespec="seconds") if results.finished else "no",
    }
    parts.append("## Where\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items()))
    return "\n\n".join(parts) + "\n"


def as_json(results: Results) -> dict[str, Any]:
    """All that is known, LoadGen's own values among it."""
    return {
        "command": results.command,
        "environment": results.environment,
        "plan": to_json(results.plan),
        "payloads": results.payloads,
        "notes": notes(results),
        "ended_early": results.ended_early,
        "finished": results.finished.isoformat() if results.finished else None,
        "failed": results.failed,
        "runs": [_run_as_json(results, run) for run in results.runs],
    }


def _run_as_json(results: Results, run: Run) -> dict[str, Any]:
    rate = run.summary.number("Samples per second") or run.summary.number("Completed samples per second")
    rate = rate or run.summary.number("QPS w/ loadgen overhead")
    return {
        "scenario": run.scenario,
        "mode": results.plan.mode,
        "verdict": run.summary.verdict,
        "reasons": run.summary.reasons,
        "samples_per_second": rate,
        **{name: run.summary.number(key) for name, key in _PERCENTILES.items()},
        "answered": run.answered,
        "failed": run.failed,
        "failures": run.failures,
        "top1": run.accuracy.top1 if run.accuracy else None,
        "labelled": run.accuracy.answered if run.accuracy else 0,
        "seconds": run.seconds,
        "warmup_rate": run.warmup_rate,
        "connections": run.connections,
        "generator_cores": run.generator_cores,
        "images": run.images,
        "loadgen": {
            "version": run.loadgen,
            "values": run.summary.values,
            "parameters": run.summary.parameters,
            "remarks": run.summary.remarks,
        },
        "mlperf_asks_for": run.rules,
        "unmet": unmet(run),
        "model": run.model,
    }


def _rows(results: Results) -> list[list[str]]:
    """The names of the columns, then a row for each run."""
    ends = ["answered", "failed", "LoadGen's cores"]
    if results.plan.accuracy:
        names = ["scenario", "mode", "top-1", "labelled", *ends]
        return [names, *([run.scenario, results.plan.mode, *_top1(run), *_ends(run)] for run in results.runs)]
    names = ["scenario", "LoadGen's verdict", "LoadGen's metric", *(key.replace("_", " ") for key in _SHOWN), *ends]
    return [
        names,
        *(
            [run.scenario, run.summary.verdict or "–", _headline(run), *_latencies(run), *_ends(run)]
            for run in results.runs
        ),
    ]


def _headline(run: Run) -> str:
    name = HEADLINES[run.scenario]
    value = run.summary.number(name)
    if value is None:
        return "–"
    if name.endswith("(ns)"):
        return f"{name.removesuffix(' (ns)')} {value:.2f} ms"
    return f"{name} {value:,.1f}"


def _latencies(run: Run) -> list[str]:
    if run.scenario == "Offline":
        return ["–"] * len(_SHOWN)
    values = [run.summary.number(_PERCENTILES[name]) for name in _SHOWN]
    return ["–" if value is None else f"{value:.2f}" for value in values]


def _top1(run: Run) -> list[str]:
    if run.accuracy is None or run.accuracy.top1 is None:
        return ["–", "0"]
    return [f"{run.accuracy.top1:.4f}", f"{run.accuracy.answered:,}"]


def _ends(run: Run) -> list[str]:
    return [f"{run.answered:,}", f"{run.failed:,}", f"{run.generator_cores:.2f}"]


def _verdict(run: Run) -> str:
    return "\n".join([f"Result is : {run.summary.verdict}", *run.summary.reasons])


def _alarms(remark: str) -> bool:
    return not remark.startswith("No ")


def _model(runs: Sequence[Run]) -> str:
    if not runs:
        return "–"
    model = runs[0].model
    manifest = model.get("manifest", {})
    if not manifest:
        return "a family, or unknown to the service"
    accuracy = manifest.get("accuracy")
    top1 = f", top-1 {accuracy['top1']} on {accuracy['dataset']}" if accuracy else ", accuracy unknown"
    return f"{manifest.get('name')} version {model.get('version')}, {manifest.get('precision')}{top1}"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    names, *rest = rows
    lines = [names, ["---", "---", *["---:"] * (len(names) - 2)], *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_READING = """\
SingleStream: one image after the other, each sent when the last is answered. Offline: all images in one query, sent
over so many connections as there are; latencies would only tell how long the run was. Server: single images at the
moments of a Poisson process; latencies count from there, and where all connections are busy, waiting for one counts.
LoadGen chooses images and moments, takes the times and gives the verdict; its logs are in the folder of each scenario.
*LoadGen's cores* is CPU time by wall time of its process, the HTTP client's among it. Before LoadGen starts the service
is warmed up with the same images."""

_READING_ACCURACY = """\
LoadGen's AccuracyOnly mode asks about each image once, gives no verdict and takes no times. Top-1 is taken from the
answers in `mlperf_log_accuracy.json`, over those that have a label."""
