"""What an accuracy run reports: tables for page and terminal, results.json, and lists of images."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.accuracy.results import CONFIDENCE, AccuracyExperiment, disagreements, figures
from loadtests.generator.readers import Label
from loadtests.report.rendering import UNKNOWN, Cell, Table, print_tables, sentences, write_report

_SHOWN_DISAGREEMENTS = 10


def write(run: AccuracyExperiment, out: Path) -> Path:
    """Write all files, print the figures, and return the report's path.

    report.md, results.json, disagreements.csv, and failures.csv if a request failed.
    """
    document = {"schema_version": 3, **run.facts(), "plan": run.plan, **figures(run)}
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
    _write_csv(out / "disagreements.csv", ["name", "label", *columns], _csv_rows(run, differing))
    failures = [
        (row["name"], block.arm, row["failure"])
        for block, answers in zip(run.blocks, run.answers, strict=True)
        for row in answers[answers["failure"] != ""]
    ]
    # A file of an earlier run must not be mistaken for this one's.
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
        shares = (f"{result['top1'].of:,}", str(result["top1"]), str(result["top5"] or UNKNOWN))
        warned = [
            Cell(f"{failed:,}", "worse" if failed else None),
            Cell(against, "worse" if check and check["missed"] else None),
        ]
        rows.append((result["model"], str(result["version"]), *shares, *warned))
    headings = ("model", "version", "images", "top-1 %", "top-5 %", "failed", "manifest")
    note = f"In brackets: {CONFIDENCE:.0%} intervals (Wilson)."
    return Table(title="Accuracy as served", headings=headings, rows=rows, text=(0, -1), note=note)


def _most_certain(run: AccuracyExperiment, differing: Sequence[int]) -> Table:
    """The disagreements about which the models are most certain, with the label by name, like the answers."""
    certainty = np.min([answers["probability"] for answers in run.answers], axis=0)
    rows = []
    for name, label, said in _images(run, sorted(differing, key=lambda row: -certainty[row])[:_SHOWN_DISAGREEMENTS]):
        known = run.blocks[0].info["classes"][label] if isinstance(label, int) else label or UNKNOWN
        texts = [f"{one['label']} {one['probability']:.0%}" + " ✓" * int(one["rank"] == 1) for one in said]
        failed = [one["failure"] != "" for one in said]
        rows.append((name, known, *np.where(failed, "failed", texts)))
    headings = ("image", "label", *(block.arm for block in run.blocks))
    return Table(headings=headings, rows=rows, text=range(len(headings)))


def _csv_rows(run: AccuracyExperiment, differing: Sequence[int]) -> Iterator[list[object]]:
    for name, label, said in _images(run, differing):
        cells: list[object] = [name, label]
        for one in said:
            if one["failure"]:
                cells += [None, "failed", None, 0]
            else:
                right = None if label is None else int(one["rank"] == 1)
                cells += [one["index"], one["label"], f"{one['probability']:.6f}", right]
        yield cells


def _images(run: AccuracyExperiment, rows: Sequence[int]) -> Iterator[tuple[str, Label, list[Any]]]:
    """Name and label of the images in some rows, and each model's answer."""
    answers, labels = run.answers, run.labels
    for row in rows:
        yield answers[0]["name"][row], labels[row], [one[row] for one in answers]


def _write_csv(file: Path, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([headings, *rows])
