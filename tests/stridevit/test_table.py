"""The table of `stridevit classify`: what it continues, and what it leaves alone."""

import csv
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stridevit.answers import Classification, Problem
from stridevit.classify.many import Outcome, Source
from stridevit.classify.table import Table
from tests.stridevit.stub import CLASSIFICATION

HEADER = b"image,label_1,probability_1,requested,model,version,error\n"
ROW = b"a.png,cat,0.900000,m,m,1,\n"


def answered(name: str) -> Outcome:
    return Outcome(Source(name, b""), answer=Classification.model_validate(CLASSIFICATION))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results.csv"


@pytest.mark.parametrize(
    "content",
    [
        b'{"my": "one line"}',
        b"a,b\n1,2\n3,4",
        b"image,label\na.png,cat\nb.png,do",
        b"\xff\xd8\xff\xe0\n\x00\x01\nbytes",
        HEADER.rstrip().replace(b"label", b"Label"),
        HEADER.rstrip() + b",mine",
        b"\n\n",
    ],
    ids=["no line end", "no last line end", "other columns", "binary", "near", "longer", "empty lines"],
)
def test_what_is_no_table_of_the_command_keeps_all_its_bytes(content: bytes, out: Path) -> None:
    out.write_bytes(content)
    with pytest.raises(ValueError, match="give another file"):
        Table(out, model="m", top_k=1)
    assert out.read_bytes() == content


@pytest.mark.parametrize("left", range(len(HEADER) + 1))
def test_a_run_killed_in_its_first_line_is_continued(left: int, out: Path) -> None:
    out.write_bytes(HEADER[:left])
    with Table(out, model="m", top_k=1) as table:
        assert table.done == set()
        table.add(answered("a.png"))
    assert out.read_bytes() == HEADER + ROW


@pytest.mark.parametrize("left", range(len(ROW)))
def test_a_row_that_a_killed_run_left_unfinished_is_written_again(left: int, out: Path) -> None:
    out.write_bytes(HEADER + ROW + ROW.replace(b"a.png", b"b.png")[:left])
    with Table(out, model="m", top_k=1) as table:
        assert table.done == {"a.png"}
        table.add(answered("b.png"))
    assert out.read_bytes() == HEADER + ROW + ROW.replace(b"a.png", b"b.png")


def test_a_table_that_a_spreadsheet_saved_is_continued(out: Path) -> None:
    saved = b"\xef\xbb\xbf" + (HEADER + ROW).replace(b"\n", b"\r\n")
    out.write_bytes(saved)
    with Table(out, model="m", top_k=1) as table:
        assert table.done == {"a.png"}
        table.add(answered("b.png"))
    assert out.read_bytes() == saved + ROW.replace(b"a.png", b"b.png")


@pytest.mark.parametrize(
    ("before", "now", "fix"),
    [("m", "n", "give --model m, or"), ("m", None, "give --model m, or"), (None, "m", "leave out --model, or")],
)
def test_rows_of_another_model_are_not_mixed_with_new_ones(
    before: str | None, now: str | None, fix: str, out: Path
) -> None:
    with Table(out, model=before, top_k=1) as table:
        table.add(answered("a.png"))
    written = out.read_bytes()
    with pytest.raises(ValueError, match=fix):
        Table(out, model=now, top_k=1)
    assert out.read_bytes() == written
    with Table(out, model=before, top_k=1) as table:
        assert table.done == {"a.png"}


def test_rows_with_an_error_are_told_from_the_others(out: Path) -> None:
    with Table(out, model=None, top_k=1) as table:
        table.add(answered("a.png"))
        table.add(Outcome(Source("b.png", b""), problem=Problem(detail="no\nimage", code="bad-image")))
    with Table(out, model=None, top_k=1) as table:
        assert (table.done, table.failed) == ({"a.png", "b.png"}, {"b.png"})


def test_a_second_run_into_a_table_is_refused_while_the_first_writes(out: Path) -> None:
    with Table(out, model="m", top_k=1) as table:
        with pytest.raises(ValueError, match=r"another run writes to .*results\.csv: wait for its end, or"):
            Table(out, model="m", top_k=1)
        table.add(answered("a.png"))
    with Table(out, model="m", top_k=1) as table:
        assert table.done == {"a.png"}
    assert out.read_bytes() == HEADER + ROW


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_whole_rows_only(out: Path) -> None:
    with Table(out, model="m", top_k=1) as table:
        table.add(answered("a.png"))
        with room_for(len(HEADER + ROW) + 5), pytest.raises(OSError, match=r"results\.csv"):
            table.add(answered("b.png"))
        assert out.read_bytes() == HEADER + ROW
        table.add(answered("c.png"))
    with out.open(newline="", encoding="utf-8") as text:
        assert [row["image"] for row in csv.DictReader(text)] == ["a.png", "c.png"]
