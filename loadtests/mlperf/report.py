"""What MLPerf LoadGen found: its verdict in its own words, as tables for page and terminal, and as JSON."""

from pathlib import Path
from typing import Any

from loadtests.mlperf.loadgen_logs import HEADLINES
from loadtests.mlperf.run import MlperfRun
from loadtests.report.rendering import UNKNOWN, Cell, Table, print_tables, sentences, write_report


def write(results: MlperfRun, out: Path) -> Path:
    """Write report.md and results.json, print the table, and return the report's path."""
    plan, runs, said = results.plan, table(results), notes(results)
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


def table(results: MlperfRun) -> Table:
    """One row per scenario."""
    rows = [_row(run, accuracy=results.plan.accuracy) for run in results.runs]
    cells = [list(row.values()) for row in rows]
    return Table(title="MLPerf LoadGen", headings=list(rows[0]), rows=cells, text=(0, 1))


def _row(run: dict[str, Any], *, accuracy: bool) -> dict[str, str | Cell]:
    """Cells by heading."""
    if accuracy:
        measured = {"mode": run["mode"], "top-1": _known(run["top1"], ".4f"), "labelled": f"{run['labelled']:,}"}
    else:
        name = HEADLINES[run["scenario"]]
        headline = f"{name.removesuffix(' (ns)')} {_known(run['summary'].number(name), ',.2f')}"
        measured = {
            "verdict": run["verdict"],
            "LoadGen's metric": headline + " ms" * name.endswith("(ns)"),
            # Those of Offline, which is one query, would only tell how long the run was.
            **{
                f"p{rank} ms": _known(None if run["scenario"] == "Offline" else run[f"p{rank}_ms"], ".2f")
                for rank in (50, 90, 99)
            },
        }
    return {
        "scenario": run["scenario"],
        **measured,
        "answered": f"{run['answered']:,}",
        "failed": Cell(f"{run['failed']:,}", "worse" if run["failed"] else None),
        "LoadGen's cores": f"{run['generator_cores']:.2f}",
    }


def _known(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def _model(model: dict[str, Any]) -> str:
    manifest = model.get("manifest")
    if not manifest:
        return "a family, or unknown to the service"
    accuracy = manifest.get("accuracy")
    top1 = f"top-1 {accuracy['top1']} on {accuracy['dataset']}" if accuracy else "accuracy unknown"
    return f"{manifest.get('name')} version {model.get('version')}, {manifest.get('precision')}, {top1}"
