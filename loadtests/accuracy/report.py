"""What a survey of accuracy says: a table for the terminal, a page, a JSON file, and lists of disagreements."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from loadtests.accuracy.figures import CONFIDENCE, Check, Figures, Share, Versus, disagreements, figures, versus
from loadtests.accuracy.survey import Answer, Asked, Survey
from loadtests.experiment.json_files import write_json

SIGNIFICANT = 1 - CONFIDENCE
_SHOWN = 10
"""Of the disagreements, on the page."""
_HEADINGS = ("model", "version", "images", "top-1 %", "top-5 %", "failed", "manifest")


def write(survey: Survey, out: Path, *, tolerance: float, about: Mapping[str, str]) -> None:
    """report.md, results.json, disagreements.csv, and failures.csv if a request failed, in `out`."""
    (out / "report.md").write_text(markdown(survey, tolerance=tolerance, about=about), encoding="utf-8")
    write_json(as_json(survey, tolerance=tolerance, about=about), out / "results.json")
    _write_disagreements(survey, out / "disagreements.csv")
    _write_failures(survey, out / "failures.csv")


def warnings(survey: Survey) -> list[str]:
    """What a reader must know before the figures."""
    said = []
    if survey.ended_early:
        said.append(f"Ended early: {survey.ended_early}; {len(survey.asked):,} of {survey.images:,} images were asked.")
    failed = sum(answer.failure is not None for asked in survey.asked for answer in asked.answers)
    if failed:
        said.append(
            f"{failed:,} {'request' if failed == 1 else 'requests'} failed: they count as wrong answers, "
            "and failures.csv lists them."
        )
    if survey.cut:
        said.append(f"Not the whole set: --most left out its last {survey.cut:,} images.")
    if survey.unlabelled:
        said.append(f"{survey.unlabelled:,} images have no label and were left out.")
    return said


def summary(survey: Survey) -> str:
    """What was asked, and how fast."""
    speed = f", {len(survey.asked) / survey.seconds:,.0f} a second" if survey.seconds else ""
    retries = f", {survey.retries:,} retries after 429" if survey.retries else ""
    return (
        f"{len(survey.asked):,} {survey.words}, asked over HTTP, one a request, {survey.plan.connections} at a time, "
        f"in {survey.seconds:.1f} s{speed}{retries}"
    )


def table(survey: Survey, *, tolerance: float) -> Table:
    """For the terminal."""
    shown = Table(title="Accuracy as served", caption=f"in brackets: {100 * CONFIDENCE:.0f} % intervals (Wilson)")
    for number, heading in enumerate(_HEADINGS):
        shown.add_column(heading, justify="left" if number in (0, len(_HEADINGS) - 1) else "right")
    for one in figures(survey, tolerance=tolerance):
        style = "red" if one.failed or (one.check and one.check.same_set and not one.check.holds) else None
        shown.add_row(*_row(one), style=style)
    return shown


def comparison_lines(survey: Survey) -> list[str]:
    """The first model against the second, in words; nothing with one model."""
    found = versus(survey)
    if found is None:
        return []
    first, second = (model.name for model in survey.models)
    lines = [f"{first} and {second} give the same class for {_counted(found.equal)}."]
    if found.labelled:
        lines.append(
            f"Of {found.labelled:,} labelled images {first} alone has {found.only_first:,} right, {second} alone "
            f"{found.only_second:,}: {found.points:+.2f} points of top-1 for {first} "
            f"({found.interval[0]:+.2f} to {found.interval[1]:+.2f}), {_verdict(found, first, second)} "
            f"(exact McNemar test, p {_p(found.p_value)})."
        )
    return lines


def markdown(survey: Survey, *, tolerance: float, about: Mapping[str, str]) -> str:
    """The page."""
    parts = ["# Accuracy as served", f"{summary(survey)}."]
    parts += [f"**{warning}**" for warning in warnings(survey)]
    rows = [_HEADINGS, ("---",) * len(_HEADINGS), *map(_row, figures(survey, tolerance=tolerance))]
    parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
    parts.append(
        f"In brackets: {100 * CONFIDENCE:.0f} % intervals (Wilson), for the chance that lies in the choice of images. "
        f"A manifest's figure for the same images must be met within {tolerance:g} points; for others it should lie in "
        "the interval."
    )
    parts += comparison_lines(survey)
    differing = disagreements(survey)
    if differing:
        what = "Disagreements of the two models" if len(survey.models) > 1 else "Images it has wrong"
        parts.append(f"## {what}\n\n{len(differing):,}, all in disagreements.csv. The most certain:")
        parts.append(_most_certain(survey, differing))
    parts.append("## Measured on\n\n" + "\n".join(f"- {name}: {value}" for name, value in about.items()))
    return "\n\n".join(parts) + "\n"


def as_json(survey: Survey, *, tolerance: float, about: Mapping[str, str]) -> dict[str, Any]:
    """Everything but the single answers."""
    against = versus(survey)
    return {
        "schema_version": 1,
        "about": dict(about),
        "data": survey.words,
        "images": survey.images,
        "asked": len(survey.asked),
        "unlabelled_left_out": survey.unlabelled,
        "retries": survey.retries,
        "seconds": round(survey.seconds, 3),
        "connections": survey.plan.connections,
        "ended_early": survey.ended_early,
        "confidence": CONFIDENCE,
        "tolerance_points": tolerance,
        "models": [
            {
                "model": one.model.name,
                "version": one.model.version,
                "top1": _share_as_json(one.top1),
                "top5": _share_as_json(one.top5),
                "failed": one.failed,
                "manifest": _check_as_json(one.check),
            }
            for one in figures(survey, tolerance=tolerance)
        ],
        "against": {
            "same_class": _share_as_json(against.equal),
            "labelled": against.labelled,
            "only_first_right": against.only_first,
            "only_second_right": against.only_second,
            "points": against.points if against.labelled else None,
            "interval_points": against.interval if against.labelled else None,
            "p_value": against.p_value if against.labelled else None,
        }
        if against
        else None,
    }


def _row(one: Figures) -> tuple[str, ...]:
    return (
        one.model.name,
        str(one.model.version),
        f"{one.top1.of:,}",
        _percent(one.top1),
        _percent(one.top5) if one.top5 else "–",
        f"{one.failed:,}",
        _manifest(one.check),
    )


def _percent(share: Share) -> str:
    if not share.of:
        return "–"
    low, high = share.interval
    return f"{100 * share.value:.2f} ({100 * low:.2f}–{100 * high:.2f})"


def _counted(share: Share) -> str:
    return f"{share.hits:,} of {share.of:,} images, {_percent(share)} %"


def _manifest(check: Check | None) -> str:
    if check is None:
        return "nothing to compare with"
    stated = f"{100 * check.stated.top1:.2f} of {check.stated.n:,} ({check.stated.dataset} {check.stated.split})"
    if not check.same_set:
        return f"{stated}: {'inside' if check.holds else 'OUTSIDE'} the interval"
    if not check.images:
        return f"{stated}: the same"
    found = f"{check.images:+,} {'image' if abs(check.images) == 1 else 'images'} here ({check.points:+.2f} points)"
    return f"{stated}: {'' if check.holds else 'DIFFERS, '}{found}"


def _verdict(found: Versus, first: str, second: str) -> str:
    if found.p_value >= SIGNIFICANT:
        return "no difference seen"
    return f"{first if found.only_first > found.only_second else second} is better"


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"= {value:.4f}"


def _most_certain(survey: Survey, differing: list[Asked]) -> str:
    names = [model.name for model in survey.models]
    rows = [["image", "label", *names], ["---"] * (2 + len(names))]
    first = sorted(differing, key=lambda asked: -min(answer.probability for answer in asked.answers))
    for asked in first[:_SHOWN]:
        rows.append([asked.name, _label(survey, asked), *map(_said, asked.answers)])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _label(survey: Survey, asked: Asked) -> str:
    """By name, as the answers are."""
    if isinstance(asked.label, int):
        return survey.models[0].labels[asked.label]
    return asked.label or "–"


def _said(answer: Answer) -> str:
    if answer.failure is not None:
        return "failed"
    return f"{answer.label} {100 * answer.probability:.0f} %" + (" ✓" if answer.right else "")


def _write_disagreements(survey: Survey, file: Path) -> None:
    """In the order of the data."""
    columns = [f"{model.name} {what}" for model in survey.models for what in ("index", "class", "probability", "right")]
    with file.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["name", "label", *columns])
        for asked in disagreements(survey):
            label = "" if asked.label is None else asked.label
            cells: list[object] = []
            for answer in asked.answers:
                if answer.failure is not None:
                    cells += ["", "failed", "", 0]
                else:
                    right = "" if asked.label is None else int(answer.right)
                    cells += [answer.index, answer.label, f"{answer.probability:.6f}", right]
            rows.writerow([asked.name, label, *cells])


def _write_failures(survey: Survey, file: Path) -> None:
    failed = [
        (asked.name, model.name, answer.failure)
        for asked in survey.asked
        for model, answer in zip(survey.models, asked.answers, strict=True)
        if answer.failure is not None
    ]
    if not failed:
        # One of an earlier run must not pass for this one's.
        file.unlink(missing_ok=True)
        return
    with file.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["name", "model", "failure"])
        rows.writerows(failed)


def _share_as_json(share: Share | None) -> dict[str, Any] | None:
    if share is None or not share.of:
        return None
    return {"hits": share.hits, "of": share.of, "share": share.value, "interval": share.interval}


def _check_as_json(check: Check | None) -> dict[str, Any] | None:
    if check is None:
        return None
    return {
        **vars(check.stated),
        "same_set": check.same_set,
        "images_more_here": check.images,
        "points_more_here": check.points,
        "holds": check.holds,
    }
