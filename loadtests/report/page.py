"""A comparison as one HTML page that needs no other file, no script and no network."""

from pathlib import Path

import jinja2

from loadtests.experiment.model import Comparison
from loadtests.report import tables
from loadtests.report.figures import SYMBOLS
from loadtests.report.plots import drawings
from loadtests.report.report import sections
from loadtests.report.verdicts import Findings
from loadtests.report.words import accuracy_note, conclusion, conditions, how_measured, how_to_read

_TEMPLATE = Path(__file__).with_name("page.html.j2")


def write_page(comparison: Comparison, findings: Findings, path: Path) -> None:
    """`report.html`. All text is escaped; the drawings are our own."""
    lead, *others = conclusion(comparison, findings)
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        conditions=conditions(comparison),
        finished=f"{comparison.finished:%Y-%m-%d %H:%M} UTC" if comparison.finished else "not finished",
        lead=lead,
        others=others,
        warnings=findings.warnings,
        headings=tables.verdict_headings(comparison, findings),
        lines=tables.verdict_lines(comparison, findings),
        symbols=SYMBOLS,
        accuracy_note=accuracy_note(comparison),
        drawings=drawings(comparison, findings),
        sections=sections(comparison, findings),
        how_measured=how_measured(comparison),
        how_to_read=how_to_read(findings),
        environment=tables.environment(comparison),
        command=comparison.command,
    )
    path.write_text(page, encoding="utf-8")
