"""What an accuracy run reports: tables for page and terminal, results.json, and lists of images."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.accuracy.results import CONFIDENCE, AccuracyExperiment, disagreements, model_results, pair_result
from loadtests.report.rendering import UNKNOWN, Cell, Table, print_tables, sentences, write_report

_SHOWN_DISAGREEMENTS = 10


def write(run: AccuracyExperiment, out: Path) -> Path:
    """Write all files, print the figures, and return the report's path.

    report.md, results.json, disagreements.csv, and failures.csv if a request failed.
    """
    document: dict[str, Any] = {
        "schema_version": 3,
        **run.facts(),
        "plan": run.plan,
        "images": len(run.images.positions),
        "beyond_limit": run.images.beyond_limit,
        "unlabelled_left_out": run.images.unlabelled,
        "confidence": CONFIDENCE,
        "models": model_results(run),
        "reference": pair_result(run),
    }
    found, differing = table(document["models"]), disagreements(run)
    caveats = sentences("accuracy_caveats.txt.j2", **document)
    summary, *comparison = sentences("accuracy.txt.j2", **document)
    write_report(
        out,
        document=document,
        template="accuracy.md.j2",
        **document,
        table=found,
        summary=summary,
        caveats=caveats,
        comparison=comparison,
        disagreements=len(differing),
        most_certain=_most_certain(run, differing),
    )
    columns = [f"{block.arm} {what}" for block in run.blocks for what in ("index", "class", "probability", "right")]
    _write_csv(out / "disagreements.csv", ["name", "label", *columns], _disagreement_rows(run, differing))
    failures = [
        (row["name"], block.arm, row["failure"])
        for block, answers in zip(run.blocks, run.answers, strict=True)
        for row in answers[answers["failure"] != ""]
    ]
    # One of an earlier run must not pass for this one's.
    (out / "failures.csv").unlink(missing_ok=True)
    if failures:
        _write_csv(out / "failures.csv", ["name", "model", "failure"], failures)
    print_tables(found, width=130)
    print(*caveats, summary, *comparison, sep="\n")
    return out / "report.md"


def table(results: list[dict[str, Any]]) -> Table:
    """One row per model."""
    rows = []
    for result in results:
        check, failed = result["manifest"], result["failed"]
        (against,) = sentences("accuracy_manifest.txt.j2", check=check)
        figures = (f"{result['top1'].of:,}", str(result["top1"]), str(result["top5"] or UNKNOWN))
        warned = [
            Cell(f"{failed:,}", "worse" if failed else None),
            Cell(against, "worse" if check and check["missed"] else None),
        ]
        rows.append((result["model"], str(result["version"]), *figures, *warned))
    headings = ("model", "version", "images", "top-1 %", "top-5 %", "failed", "manifest")
    note = f"In brackets: {CONFIDENCE:.0%} intervals (Wilson)."
    return Table(title="Accuracy as served", headings=headings, rows=rows, text=(0, -1), note=note)


def _most_certain(run: AccuracyExperiment, differing: Sequence[int]) -> Table:
    """The disagreements of which the models are most certain, with the label by name, as the answers are."""
    everything, labels = run.answers, run.images.labels
    certainty = np.min([answers["probability"] for answers in everything], axis=0)
    rows = []
    for row in sorted(differing, key=lambda row: -certainty[row])[:_SHOWN_DISAGREEMENTS]:
        label = labels[row]
        name = run.blocks[0].info["classes"][label] if isinstance(label, int) else label or UNKNOWN
        cells = [everything[0][row]["name"], name]
        for block, answers in zip(run.blocks, everything, strict=True):
            answer, classes = answers[row], block.info["classes"]
            said = f"{classes[answer['index']]} {answer['probability']:.0%}" + " ✓" * int(answer["rank"] == 1)
            cells.append("failed" if answer["failure"] else said)
        rows.append(cells)
    headings = ("image", "label", *(block.arm for block in run.blocks))
    return Table(headings=headings, rows=rows, text=range(len(headings)))


def _disagreement_rows(run: AccuracyExperiment, differing: Sequence[int]) -> Iterator[list[object]]:
    """Of each model: index and name of its class, its probability, and whether it is right, where that is known."""
    everything, labels = run.answers, run.images.labels
    for row in differing:
        cells: list[object] = [everything[0][row]["name"], labels[row]]
        for block, answers in zip(run.blocks, everything, strict=True):
            answer, classes = answers[row], block.info["classes"]
            right = None if labels[row] is None else int(answer["rank"] == 1)
            said = [answer["index"], classes[answer["index"]], f"{answer['probability']:.6f}", right]
            cells += [None, "failed", None, 0] if answer["failure"] else said
        yield cells


def _write_csv(file: Path, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([headings, *rows])
