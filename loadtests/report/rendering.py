"""How every command writes its report: tables of text, one Jinja template per format, strict JSON, and the terminal.

A command makes `Table`s of text, puts them into a template of `templates/` with `write_report`, and prints those that
belong in the terminal (`print_tables`); `loadtests/overload/report.py` is a short example. Tables may themselves stand
in a text template (`tables`): a line for each cell, which begins with the heading of its column.

`base.md.j2` ends every page with the environment and the command, and so needs `command` and `environment`.
`macros` holds what the templates share: `table(table)` with its note, `bullets(items)`, `facts(mapping)` and
`caveats(warnings)`. In a Markdown template the output of every `{{ }}` is escaped for Markdown, except that of a macro
and of the filter `fenced("sh")`, a block of code; in an HTML template it is escaped for HTML. A text template
(`caveats.txt.j2`) holds one sentence per line, for `sentences`, and escapes nothing. Filters in all of them: `joined`,
`median` (of what is known), `number`, `millions` and `span`.
"""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from markupsafe import Markup
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from loadtests.experiment.json_files import to_json

UNKNOWN = "–"
"""The text of a cell whose value is unknown, or would rest on too few samples."""

Tone = Literal["better", "worse", "faint"]
_COLOURS: dict[Tone, str] = {"better": "blue", "worse": "red", "faint": "dim"}

_LABEL = 24
"""Characters in a label of usual length."""

_NEWLINE = "\u2028"
"""Stands for a newline within a sentence while a text template is rendered."""

_TEMPLATES = Path(__file__).with_name("templates")
_MARKDOWN = re.compile(
    r"[\\`*\[|~]"  # code, emphasis, links, columns, strikethrough
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis, unless inside a word
    r"|^[#>+-](?=\s|$)|(?<=^\d)[.)](?=\s)|(?<=^\d\d)[.)](?=\s)"  # a heading, a quotation, a list
)


@dataclass(frozen=True)
class Cell:
    """A table cell whose last line has the colour of its tone (in the terminal and in HTML)."""

    text: str
    tone: Tone | None = None

    def __str__(self) -> str:
        """The text alone."""
        return self.text


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text for Markdown, HTML and the terminal alike.

    A newline in a cell begins a new line there; the first of several lines of a number is bold.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    text: Sequence[int] = (0,)
    """Columns of text, aligned left, counted from 0 (-1 is the last); all others hold numbers, aligned right."""
    title: str = ""
    """Shown in the terminal; a template writes its own headings."""
    note: str = ""
    """Shown below the table."""

    def is_text(self, column: int) -> bool:
        """Whether a column, counted from 0, holds text."""
        return column in self.text or column - len(self.headings) in self.text


def write_report(out: Path, *, document: Any, template: str, html: str | None = None, **context: Any) -> None:
    """Write `results.json`, `report.md` and, if `html` names a template, `report.html` into the folder `out`.

    `document` may hold dataclasses, paths and infinities (`loadtests.experiment.json_files`); `template`
    is a file in `loadtests/report/templates`; both templates get `context`. Raises jinja2.UndefinedError for a name
    that `context` lacks.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_bytes(to_json(document))
    (out / "report.md").write_text(render(template, **context), encoding="utf-8")
    if html is not None:
        (out / "report.html").write_text(render(html, **context), encoding="utf-8")


def render(template: str, **context: Any) -> str:
    """One template (`*.md.j2` or `*.html.j2`) as text; ends with a newline."""
    text = _environment(template.split(".")[-2]).get_template(template).render(**context)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def sentences(template: str, **context: Any) -> list[str]:
    """The lines of a text template (`*.txt.j2`), without empty ones; a newline in a value begins no new sentence."""
    lines = _environment("txt").get_template(template).render(**context).split("\n")
    return [line.strip().replace(_NEWLINE, "\n") for line in lines if line.strip()]


def tables(template: str, **context: Any) -> list[Table]:
    """The tables of a text template: for each a line `# title`, a line `heading: cell` for every cell, and its `note:`.

    A `<` before the heading makes it a column of text. The table's first heading begins the next row; a column whose
    heading already exists replaces that one. Tables without a row are left out.
    """
    found: dict[str, list[dict[str, str]]] = {}
    notes: dict[str, str] = {}
    title = ""
    for line in sentences(template, **context):
        heading, _, cell = line.partition(":")
        if line.startswith("# "):
            title = line.removeprefix("# ")
        elif heading == "note":
            notes[title] = cell.strip()
        else:
            rows = found.setdefault(title, [{}])
            if heading == next(iter(rows[0]), None):
                rows.append({})
            rows[-1][heading] = cell.strip()
    return [
        Table(
            title=title,
            headings=[heading.removeprefix("<") for heading in rows[0]],
            rows=[list(row.values()) for row in rows],
            text=[place for place, heading in enumerate(rows[0]) if heading.startswith("<")],
            note=notes.get(title, ""),
        )
        for title, rows in found.items()
    ]


def joined(items: Collection[str]) -> str:
    """`a, b and c`."""
    *first, last = items or ("",)
    return f"{', '.join(first)} and {last}" if first else last


def median(values: Iterable[float | None]) -> float | None:
    """The median of the values that are known; None if there is none."""
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def number(value: float | None) -> str:
    """Three significant digits or more, without an exponent: 4.27, 12.4, 151, 1,395."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    places = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{value:,.{places}f}".replace("-", "−")


def millions(value: float | None) -> str:
    """In millions, such as bytes in megabytes; unknown for None and 0."""
    return number(value / 1e6) if value else UNKNOWN


def span(values: Sequence[float]) -> str:
    """`4.27–12.4`: the smallest and the largest, once where they are the same."""
    return "–".join(dict.fromkeys((number(min(values)), number(max(values))))) if values else UNKNOWN


def print_tables(*shown: Table, width: int) -> None:
    """Print to standard output, which counts as at least `width` columns wide."""
    console = Console(width=max(width, Console().width))
    for table in shown:
        console.print(rich_table(table))


def rich_table(table: Table) -> RichTable:
    """A table for the terminal, with title and note; no text in it is taken for markup."""
    multiline = any("\n" in str(cell) for row in table.rows for cell in row)
    drawn = RichTable(
        title=Text(table.title) if table.title else None,
        title_justify="left",
        caption=Text(table.note) if table.note else None,
        caption_justify="left",
        show_lines=multiline,
        padding=(0, 0) if multiline else (0, 1),
    )
    for column, heading in enumerate(table.headings):
        lines = [line for row in table.rows for line in str(row[column]).split("\n")]
        drawn.add_column(
            Text(heading),
            justify="left" if table.is_text(column) else "right",
            overflow="fold",
            # Labels of usual length stay on one line; paths and reasons do not.
            no_wrap=table.is_text(column) and max(map(len, lines), default=0) <= _LABEL,
        )
    for row in table.rows:
        drawn.add_row(*(_rich_cell(cell, bold=not table.is_text(column)) for column, cell in enumerate(row)))
    return drawn


def _rich_cell(cell: str | Cell, *, bold: bool) -> Text:
    lines = str(cell).split("\n")
    text = Text("\n".join(lines))
    if bold and len(lines) > 1:
        text.stylize("bold", 0, len(lines[0]))
    if isinstance(cell, Cell) and cell.tone:
        text.stylize(_COLOURS[cell.tone], len(text) - len(lines[-1]))
    return text


@cache
def _environment(kind: str) -> jinja2.Environment:
    """For templates of Markdown (`md`), HTML (`html`) or plain text (`txt`)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        # Macros and filters give Markup, which is not escaped again. In Markdown `finalize` escapes the rest.
        autoescape=kind != "txt",  # noqa: S701 (plain text is escaped by the page that it goes into)
        finalize={"md": escaped, "txt": lambda value: str(value).replace("\n", _NEWLINE)}.get(kind),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fenced": _fenced, "joined": joined}
    environment.filters |= {"median": median, "number": number, "millions": millions, "span": span}
    if kind != "txt":
        environment.globals["macros"] = environment.get_template(f"macros.{kind}.j2").module
    return environment


def escaped(value: object) -> Markup:
    """A value as Markdown that shows exactly its text, in one line; Markup stays as it is."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split("\n"))
    text = _MARKDOWN.sub(lambda match: "\\" + match[0], text)
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;"))  # noqa: S704 (escaped here)


def _fenced(value: object, language: str = "") -> Markup:
    """A block of code."""
    text = str(value)
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{ticks}{language}\n{text}\n{ticks}")  # noqa: S704 (code is not escaped in Markdown)
