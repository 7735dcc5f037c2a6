"""One table as Markdown, HTML and in the terminal: what others wrote is shown, and never taken for markup."""

import json
import math
from pathlib import Path

import jinja2
import pytest
from markupsafe import Markup
from rich.console import Console

from loadtests.report import rendering
from loadtests.report.rendering import Cell, Table, escaped, rich_table, write_report

TABLE = Table(
    headings=("arm", "images/s | x"),
    rows=[("a_b <i> [red]", Cell("652\n×1.18 (1.08–1.29)\n✓ better", tone="better")), ("*x*", "3")],
    note="Below [the](table).",
)
PAGE = """\
{% extends "base.md.j2" %}
{% block title %}A page{% endblock %}
{% block body %}
{{ words }}

{{ macros.caveats(warnings) }}

{{ macros.table(table) }}
{% endblock %}
"""


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The templates, with `page.md.j2` and `page.html.j2` beside them."""
    loader = jinja2.ChoiceLoader(
        [
            jinja2.DictLoader({"page.md.j2": PAGE, "page.html.j2": "{{ macros.table(table, 'wide') }}{{ words }}"}),
            jinja2.FileSystemLoader(Path(rendering.__file__).with_name("templates")),
        ]
    )
    for kind in ("md", "html"):
        monkeypatch.setattr(rendering._environment(kind), "loader", loader)
    return tmp_path


def test_a_report_is_markdown_html_and_strict_json(templates: Path) -> None:
    write_report(
        templates / "out",
        document={"rate": math.inf, "folder": Path("x")},
        template="page.md.j2",
        html="page.html.j2",
        words="a < b",
        warnings=["1. first", "| second"],
        table=TABLE,
        environment={"cpu": "<b>"},
        command="python `x`",
    )
    assert json.loads((templates / "out" / "results.json").read_text()) == {"rate": None, "folder": "x"}
    assert (templates / "out" / "report.md").read_text() == (
        "# A page\n\na &lt; b\n\n**Caveats**\n\n- 1\\. first\n- \\| second\n\n"
        "| arm | images/s \\| x |\n| --- | ---: |\n"
        "| a_b &lt;i> \\[red] | **652**<br>×1.18 (1.08–1.29)<br>✓ better |\n"
        "| \\*x\\* | 3 |\n\nBelow \\[the](table).\n\n"
        "## Environment\n\n- cpu: &lt;b>\n\n## Command\n\n```sh\npython `x`\n```\n"
    )
    page = (templates / "out" / "report.html").read_text()
    assert '<table class="wide">' in page
    assert "a_b &lt;i&gt; [red]" in page
    assert '<b>652</b><small>×1.18 (1.08–1.29)</small><small class="better">✓ better</small>' in page
    assert page.endswith("a &lt; b\n")


def test_a_name_that_the_context_lacks_is_an_error(templates: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="'table' is undefined"):
        rendering.render("page.html.j2", words="")


def test_the_terminal_shows_text_and_no_markup() -> None:
    console = Console(width=60, force_terminal=False)
    with console.capture() as captured:
        console.print(rich_table(TABLE))
    lines = captured.get().splitlines()
    assert any(line.startswith("│a_b <i> [red]│") and line.endswith(" 652│") for line in lines)
    assert any("✓ better" in line for line in lines)
    assert lines[-1].strip() == "Below [the](table)."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("max_batch=1, _x_ and *y*", "max_batch=1, \\_x\\_ and \\*y\\*"),
        ("# no heading", "\\# no heading"),
        ("12. no list", "12\\. no list"),
        ("−1.2 to +3.4 ms", "−1.2 to +3.4 ms"),
        ("two\nlines", "two lines"),
        ("C:\\x `code`", "C:\\\\x \\`code\\`"),
        (Markup("<br>"), "<br>"),
        (3, "3"),
    ],
)
def test_markdown_shows_the_very_text(text: object, shown: str) -> None:
    assert escaped(text) == shown


def test_text_of_several_lines_needs_no_cell(templates: Path) -> None:
    table = Table(headings=("arm", "why"), rows=[("a", "it died:\nthe end of its log")], text=(0, 1))
    page = rendering.render("page.html.j2", words="", table=table)
    assert "it died:" in page
    assert "<small>the end of its log</small>" in page
