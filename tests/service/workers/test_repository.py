"""A change of the models holds in all workers or in none."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import httpx
import pytest

from service.errors import BadRequest, NotReady, RequestError, UnknownModel
from service.workers.inside import Restore
from service.workers.member import Index, Member
from service.workers.repository import Repository


class FakeMember:
    """A worker with models in memory; `fails` is raised by its next load."""

    def __init__(self, number: int, **serves: list[int]) -> None:
        self.number, self.serves, self.alive = number, dict(serves), True
        self.fails: Exception | None = None
        self.newest = 2

    async def index(self) -> Index:
        return [
            {"name": name, "version": version, "state": "ready", "reason": ""}
            for name, versions in self.serves.items()
            for version in versions
        ]

    async def load(self, name: str) -> Index:
        if self.fails:
            raise self.fails
        self.serves[name] = [self.newest]
        return await self.index()

    refresh_of: Callable[[], Awaitable[None]] | None = None

    async def refresh(self) -> Index:
        return await self.load("a")

    async def unload(self, name: str) -> Index:
        if name not in self.serves:
            raise UnknownModel(f"model {name!r} is not loaded")
        del self.serves[name]
        return await self.index()

    async def restore(self, wishes: list[Restore]) -> Index:
        for wish in wishes:
            self.serves.pop(wish.name, None)
            if wish.versions:
                self.serves[wish.name] = wish.versions
        return await self.index()


def repository(*members: FakeMember, polls: bool = False) -> Repository:
    return Repository(lambda: cast("list[Member]", list(members)), polls=polls)


def run(work: Awaitable[Any]) -> Any:
    async def awaited() -> Any:
        return await work

    return asyncio.run(awaited())


def test_a_load_reaches_all_workers() -> None:
    members = [FakeMember(number, a=[1]) for number in range(3)]
    run(repository(*members).load("a"))
    assert [member.serves for member in members] == [{"a": [2]}] * 3


def test_a_broken_bundle_fails_in_the_first_worker_and_changes_nothing() -> None:
    members = [FakeMember(number, a=[1]) for number in range(3)]
    members[0].fails = BadRequest("digest of model.onnx does not match")
    with pytest.raises(BadRequest, match=r"^digest of model.onnx does not match$"):
        run(repository(*members).load("a"))
    assert [member.serves for member in members] == [{"a": [1]}] * 3


@pytest.mark.parametrize("before", [{"a": [1]}, {}])
def test_if_one_worker_fails_the_others_go_back_and_the_error_says_which_and_why(before: dict[str, list[int]]) -> None:
    members = [FakeMember(number, **before) for number in range(3)]
    members[1].fails = NotReady("needs 90 MiB of memory")
    with pytest.raises(NotReady, match="worker 1: needs 90 MiB of memory; the other workers serve what they served"):
        run(repository(*members).load("a"))
    assert [member.serves for member in members] == [before] * 3


def test_a_worker_that_dies_during_a_load_keeps_the_others_from_nothing() -> None:
    members = [FakeMember(number, a=[1]) for number in range(3)]
    members[2].fails, members[2].alive = httpx.ReadError("gone"), False
    run(repository(*members).load("a"))
    assert [member.serves for member in members[:2]] == [{"a": [2]}] * 2


def test_an_unknown_model_is_the_error_of_one_worker() -> None:
    with pytest.raises(UnknownModel):
        run(repository(FakeMember(0), FakeMember(1)).unload("a"))


def test_without_a_ready_worker_the_answer_is_503() -> None:
    with pytest.raises(NotReady):
        run(repository().load("a"))
    with pytest.raises(NotReady):
        run(repository().index())


@pytest.mark.parametrize("polls", [False, True])
def test_a_worker_that_starts_again_leaves_out_what_was_unloaded(polls: bool) -> None:
    members = [FakeMember(number, a=[1], b=[1]) for number in range(2)]
    models = repository(*members, polls=polls)
    run(models.unload("b"))
    run(models.adopt(cast("Member", again := FakeMember(0, a=[1], b=[1]))))
    assert again.serves == {"a": [1]}


def test_a_worker_that_starts_again_serves_the_versions_of_the_others_not_newer_ones() -> None:
    members = [FakeMember(number, a=[1]) for number in range(2)]
    models = repository(*members)
    for member in members:
        run(models.adopt(cast("Member", member)))
    run(models.adopt(cast("Member", again := FakeMember(0, a=[2], new=[1]))))
    assert again.serves == {"a": [1]}


def test_with_polling_a_worker_that_starts_again_may_be_ahead_until_the_next_poll() -> None:
    members = [FakeMember(number, a=[1]) for number in range(2)]
    models = repository(*members, polls=True)
    run(models.adopt(cast("Member", members[0])))
    run(models.adopt(cast("Member", again := FakeMember(1, a=[2]))))
    assert again.serves == {"a": [2]}
    run(models.refresh())
    assert members[0].serves == {"a": [2]}


def test_a_poll_goes_on_with_the_other_workers_if_one_fails() -> None:
    members = [FakeMember(number, a=[1]) for number in range(3)]
    members[0].fails = RequestError("no")
    run(repository(*members).refresh())
    assert [member.serves["a"] for member in members] == [[1], [2], [2]]


def test_the_index_says_where_workers_differ() -> None:
    members = [FakeMember(0, a=[1], b=[1]), FakeMember(1, b=[1])]
    found = {entry["name"]: entry for entry in run(repository(*members).index())}
    assert found["b"]["state"] == "ready"
    assert (found["a"]["state"], found["a"]["reason"]) == ("loading", "worker 0: ready; worker 1: not there")
