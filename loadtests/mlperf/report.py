"""What MLPerf LoadGen found: its verdict in its own words, as tables for page and terminal, and as JSON."""

from pathlib import Path
from typing import Any

from loadtests.mlperf.loadgen_logs import HEADLINES
from loadtests.mlperf.run import MlperfRun
from loadtests.report.rendering import print_tables, sentences, tables, write_report


def write(results: MlperfRun, out: Path) -> Path:
    """Write report.md and results.json, print the table, and return the report's path."""
    plan, said = results.plan, notes(results)
    (runs,) = tables("mlperf_tables.txt.j2", runs=results.runs, accuracy=plan.accuracy, headlines=HEADLINES)
    facts = {
        "images": results.payloads,
        "LoadGen": results.runs[0]["loadgen"],
        "model": _model(results.runs[0]["model"]),
        "setting": "full" if plan.full else "quick",
        "finished": results.finished.isoformat(timespec="seconds") if results.finished else "no",
    }
    figures = {"plan": plan, "notes": said, "failed": results.failed, "runs": results.runs}
    write_report(
        out,
        document={"schema_version": 2, **results.facts(), **figures},
        template="mlperf.md.j2",
        command=results.command,
        environment={**facts, **results.environment},
        notes=said,
        runs=runs,
        accuracy=plan.accuracy,
        scenarios=results.runs,
    )
    print_tables(runs, width=150)
    return out / "report.md"


def notes(results: MlperfRun) -> list[str]:
    """What must be said with the figures, most important first."""
    return sentences("mlperf_notes.txt.j2", **vars(results))


def _model(model: dict[str, Any]) -> str:
    manifest = model.get("manifest")
    if not manifest:
        return "a family, or unknown to the service"
    accuracy = manifest.get("accuracy")
    top1 = f"top-1 {accuracy['top1']} on {accuracy['dataset']}" if accuracy else "accuracy unknown"
    return f"{manifest.get('name')} version {model.get('version')}, {manifest.get('precision')}, {top1}"
