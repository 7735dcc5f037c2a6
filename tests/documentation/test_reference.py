"""What is generated in docs/ is what the code says now."""

import re
from collections.abc import Callable

import pytest

from tests.documentation.figures import PICTURES
from tests.documentation.reference import markdown
from tests.documentation.reference.pages import PAGES
from tests.processes import ROOT

RENEW = "renew it: make reference"


@pytest.mark.parametrize(("name", "make"), PAGES.items(), ids=PAGES)
def test_a_generated_page_is_current(name: str, make: Callable[[], str]) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == make(), RENEW


@pytest.mark.parametrize(("name", "draw"), PICTURES.items(), ids=PICTURES)
def test_a_picture_is_current_and_small(name: str, draw: Callable[[], str]) -> None:
    drawn = draw()
    assert (ROOT / "docs" / "pictures" / name).read_text(encoding="utf-8") == drawn, RENEW
    assert len(drawn) < 100_000


def test_every_metric_that_the_page_of_alerts_names_exists() -> None:
    """A histogram has more series than its name."""
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("monitoring.md", "metrics.md")]
    named, there = (set(re.findall(r"\b(?:stridevit|process)_[a-z_]+", page)) for page in pages)
    there |= {f"{metric}_{end}" for metric in there for end in ("bucket", "sum", "count")}
    assert named
    assert named - there == set()


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "exclusiveMinimum": 0}, "integer > 0"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "string or null"),
        ({"type": "array", "items": {"$ref": "#/components/schemas/Problem"}}, "list of [Problem](#problem)"),
        ({"enum": ["a", "b"]}, "`a` or `b`"),
        ({"const": True}, "`true`"),
        ({"type": "array", "prefixItems": [{"type": "number"}, {"type": "integer"}]}, "[number, integer]"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "object of number"),
        ({"type": "string", "format": "binary"}, "bytes"),
        ({}, "any"),
    ],
)
def test_a_schema_is_told_in_words(schema: markdown.Schema, words: str) -> None:
    assert markdown.kind(schema) == words


def test_what_would_break_a_row_of_a_table_is_escaped() -> None:
    assert markdown.table(["a"], [["x | y\nz"]]).splitlines() == ["| a |", "| --- |", "| x \\| y z |"]
