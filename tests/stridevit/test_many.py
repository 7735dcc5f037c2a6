"""Tries, pauses and deadlines of many images, on a clock of the test."""

from pathlib import Path
from typing import Any

import anyio
import pytest

from stridevit import AsyncClient, Busy, Rejected
from stridevit.answers import Problem
from stridevit.classify.many import Outcome, Source, Wishes, classify_all
from stridevit.pictures import MOST_BYTES
from tests.service.conftest import Clock
from tests.stridevit.stub import CLASSIFICATION, Reply, Stub, problem

ONE = [Source("a.png", b"a")]


def run(stub: Stub, sources: list[Source], **wishes: Any) -> tuple[list[Outcome], list[float]]:
    """The outcomes, and the pauses, which are made on the test's clock."""
    clock, pauses, outcomes = Clock(), list[float](), list[Outcome]()
    asked = Wishes(**{"model": None, "deadline_ms": None, "whole": False, "top_k": 1, "priority": None} | wishes)

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock.now += seconds

    async def main() -> None:
        async with AsyncClient(stub.url, retries=0, clock=clock) as client:
            await classify_all(client, sources, asked, most=1, report=outcomes.append, clock=clock, sleep=sleep)

    anyio.run(main)
    return outcomes, pauses


def deadlines(stub: Stub) -> list[float]:
    return [float(asked.query["deadline_ms"]) for asked in stub.asked]


def test_a_whole_deadline_holds_over_all_tries_and_passes_on_what_is_left(stub: Stub) -> None:
    stub.replies = [problem(429, "overloaded", retry_after_ms=100_000)]
    (outcome,), pauses = run(stub, ONE, deadline_ms=250_000, whole=True)
    first, second = pauses
    assert deadlines(stub) == pytest.approx([250e3, 1000 * (250 - first), 1000 * (250 - first - second)], abs=0.1)
    assert outcome.problem
    assert (outcome.problem.code, outcome.final) == ("overloaded", False)


def test_a_deadline_for_each_try_begins_again_until_patience_ends(stub: Stub) -> None:
    stub.replies = [problem(429, "overloaded", retry_after_ms=9_000)]
    with pytest.raises(Busy, match=r"a\.png: this is overloaded"):
        run(stub, ONE, deadline_ms=400_000)
    assert deadlines(stub) == [400_000] * 4


@pytest.mark.parametrize(
    "refusal",
    [Reply(503, b"", {"Retry-After": "0"}), problem(429, "overloaded", retry_after_ms=-5)],
    ids=["503", "429"],
)
def test_no_pause_is_no_pause_at_all_nor_the_same_for_all(refusal: Reply, stub: Stub) -> None:
    stub.replies = [*[refusal] * 5, Reply(body=CLASSIFICATION)]
    (outcome,), pauses = run(stub, ONE)
    assert outcome.answer
    assert (len(set(pauses)), min(pauses) >= 0.05, max(pauses) <= 0.055) == (5, True, True)


def test_what_ends_the_run_names_the_image(stub: Stub) -> None:
    stub.replies = [Reply(body=CLASSIFICATION), problem(422, "invalid-parameter")]
    with pytest.raises(Rejected, match=r"b\.png: this is invalid-parameter") as raised:
        run(stub, [Source("a.png", b"a"), Source("b.png", b"b"), Source("c.png", b"c")])
    assert (raised.value.status, raised.value.request_id, len(stub.asked)) == (422, "r9", 2)


def test_a_file_beyond_all_sense_is_not_read_and_the_others_are_sent(stub: Stub, tmp_path: Path) -> None:
    large = tmp_path / "large.tif"
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    (refused, answered), _ = run(stub, [Source("large.tif", large), *ONE])
    assert refused.problem
    assert (refused.problem.code, refused.final) == ("unreadable", True)
    assert "larger than 256 MiB" in refused.problem.detail
    assert (answered.source.name, [asked.body for asked in stub.asked]) == ("a.png", [b"a"])


def test_a_folder_that_cannot_be_listed_is_unreadable(stub: Stub) -> None:
    (outcome,), _ = run(stub, [Source("sub", PermissionError(13, "Permission denied", "sub"))])
    assert outcome.problem == Problem(detail="Permission denied", code="unreadable")
    assert stub.asked == []
