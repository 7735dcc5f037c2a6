"""What an accuracy run reports: tables for page and terminal, results.json, and lists of images."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from loadtests.accuracy.evaluate import AccuracyRun, Answer, Image
from loadtests.accuracy.results import (
    CONFIDENCE,
    ManifestCheck,
    Proportion,
    disagreements,
    model_results,
    pair_result,
)
from loadtests.report.rendering import UNKNOWN, Cell, Table, print_tables, write_report

_SHOWN_DISAGREEMENTS = 10


def write(run: AccuracyRun, out: Path) -> Path:
    """Write all files, print the figures, and return the report's path.

    report.md, results.json, disagreements.csv, and failures.csv if a request failed.
    """
    models, differing = table(run), disagreements(run)
    write_report(
        out,
        document=as_json(run),
        template="accuracy.md.j2",
        command=run.command,
        environment=run.environment,
        summary=summary(run),
        caveats=caveats(run),
        models=models,
        max_drop_points=run.plan.max_drop_points,
        comparison=comparison(run),
        pair=len(run.models) > 1,
        disagreements=len(differing),
        most_certain=_most_certain(run, differing),
    )
    columns = [f"{model.name} {what}" for model in run.models for what in ("index", "class", "probability", "right")]
    _write_csv(out / "disagreements.csv", ["name", "label", *columns], map(_csv_row, differing))
    failures = [
        (image.name, model.name, answer.failure)
        for image in run.images
        for model, answer in zip(run.models, image.answers, strict=True)
        if answer.failure is not None
    ]
    # One of an earlier run must not pass for this one's.
    (out / "failures.csv").unlink(missing_ok=True)
    if failures:
        _write_csv(out / "failures.csv", ["name", "model", "failure"], failures)
    print_tables(models, width=130)
    print(*caveats(run), summary(run), *comparison(run), sep="\n")
    return out / "report.md"


def as_json(run: AccuracyRun) -> dict[str, Any]:
    """Everything but the single answers."""
    return {
        "schema_version": 2,
        **run.facts(),
        "plan": run.plan,
        "images": run.total,
        "sent": len(run.images),
        "unlabelled_left_out": run.unlabelled,
        "retries": run.retries,
        "seconds": run.seconds,
        "confidence": CONFIDENCE,
        "models": model_results(run),
        "reference": pair_result(run),
    }


def caveats(run: AccuracyRun) -> list[str]:
    """What a reader must know before the figures."""
    found = []
    if run.ended_early:
        found.append(f"Ended early: {run.ended_early}; {len(run.images):,} of {run.total:,} images were sent.")
    if failed := sum(result.failed for result in model_results(run)):
        found.append(
            f"{failed:,} {'request' if failed == 1 else 'requests'} failed: they count as wrong answers, "
            "and failures.csv lists them."
        )
    if run.beyond_limit:
        found.append(f"Not the whole set: --limit left out its last {run.beyond_limit:,} images.")
    if run.unlabelled:
        found.append(f"{run.unlabelled:,} images have no label and were left out.")
    return found


def summary(run: AccuracyRun) -> str:
    """What was sent, and how fast."""
    speed = f", {len(run.images) / run.seconds:,.0f} a second" if run.seconds else ""
    retries = f", {run.retries:,} retries after 429" if run.retries else ""
    return (
        f"{len(run.images):,} {run.payloads}, sent over HTTP, one per request, {run.plan.connections} at a time, "
        f"in {run.seconds:.1f} s{speed}{retries}."
    )


def table(run: AccuracyRun) -> Table:
    """One row per model."""
    return Table(
        title="Accuracy as served",
        headings=("model", "version", "images", "top-1 %", "top-5 %", "failed", "manifest"),
        rows=[
            (
                result.model,
                str(result.version),
                f"{result.top1.of:,}",
                _percent(result.top1),
                _percent(result.top5) if result.top5 else UNKNOWN,
                Cell(f"{result.failed:,}", "worse" if result.failed else None),
                Cell(_manifest(result.manifest), "worse" if result.misses_manifest else None),
            )
            for result in model_results(run)
        ],
        text=(0, -1),
        note=f"In brackets: {CONFIDENCE:.0%} intervals (Wilson).",
    )


def comparison(run: AccuracyRun) -> list[str]:
    """The model against the reference in sentences; none without a reference."""
    pair = pair_result(run)
    if pair is None:
        return []
    first, second = (model.name for model in run.models)
    shared = f"{pair.same_class.hits:,} of {pair.same_class.of:,} images, {_percent(pair.same_class)} %"
    sentences = [f"{first} and {second} give the same class for {shared}."]
    if not pair.labelled:
        return sentences
    better = first if pair.only_model_right > pair.only_reference_right else second
    verdict = "no difference seen" if pair.p_value >= 1 - CONFIDENCE else f"{better} is better"
    p_value = "< 0.0001" if pair.p_value < 0.0001 else f"= {pair.p_value:.4f}"
    low, high = pair.interval_points
    sentences.append(
        f"Of {pair.labelled:,} labelled images {first} alone has {pair.only_model_right:,} right, {second} alone "
        f"{pair.only_reference_right:,}: {pair.points:+.2f} points of top-1 for {first} ({low:+.2f} to {high:+.2f}), "
        f"{verdict} (exact McNemar test, p {p_value})."
    )
    if all(model.trained for model in run.models):
        sentences.append(
            "The difference belongs to these weights: training with another seed may change it by as much."
        )
    return sentences


def _percent(share: Proportion) -> str:
    low, high = share.interval
    return f"{100 * share.share:.2f} ({100 * low:.2f}–{100 * high:.2f})" if share.of else UNKNOWN


def _manifest(check: ManifestCheck | None) -> str:
    if check is None:
        return "nothing to compare with"
    images = check.images_more_here
    text = f"{100 * check.top1:.2f} of {check.n:,} ({check.dataset} {check.split})"
    if images is None:
        return f"{text}: {'inside' if check.holds else 'OUTSIDE'} the interval"
    if not images:
        return f"{text}: the same"
    found = f"{images:+,} {'image' if abs(images) == 1 else 'images'} here ({check.points_more_here:+.2f} points)"
    return f"{text}: {'' if check.holds else 'DIFFERS, '}{found}"


def _most_certain(run: AccuracyRun, differing: Sequence[Image]) -> Table:
    """The disagreements of which the models are most certain, with the label by name, as the answers are."""
    ordered = sorted(differing, key=lambda image: -min(answer.probability for answer in image.answers))
    names, labels = [model.name for model in run.models], run.models[0].labels
    return Table(
        headings=("image", "label", *names),
        rows=[
            (
                image.name,
                labels[image.label] if isinstance(image.label, int) else image.label or UNKNOWN,
                *map(_answer, image.answers),
            )
            for image in ordered[:_SHOWN_DISAGREEMENTS]
        ],
        text=range(2 + len(names)),
    )


def _answer(answer: Answer) -> str:
    if answer.failure is not None:
        return "failed"
    return f"{answer.label} {answer.probability:.0%}" + (" ✓" if answer.correct else "")


def _csv_row(image: Image) -> list[object]:
    row: list[object] = [image.name, "" if image.label is None else image.label]
    for answer in image.answers:
        if answer.failure is not None:
            row += ["", "failed", "", 0]
        else:
            right = "" if image.label is None else int(answer.correct)
            row += [answer.index, answer.label, f"{answer.probability:.6f}", right]
    return row


def _write_csv(file: Path, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([headings, *rows])
