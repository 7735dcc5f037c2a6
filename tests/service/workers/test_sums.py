"""Limits that hold for several processes, each here an object over the same file."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from service.errors import KeyLimited, Overloaded
from service.keys import KeyEntry
from service.workers.sums import SharedRoom, SharedUsage, Sums
from tests.processes import ROOT
from tests.service.conftest import Clock


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[Callable[[int], Sums]]:
    """The file as the process of a row maps it, of three."""
    with ExitStack() as stack:
        yield lambda row: stack.enter_context(Sums(tmp_path / "sums", rows=3, row=row))


def room(sums: Sums) -> SharedRoom:
    return SharedRoom(
        sums,
        max_images=8,
        max_bytes=1000,
        reserved_fraction=0.25,
        large_body_bytes=100,
        large_bodies_fraction=0.5,
    )


def hold(room: SharedRoom, count: int, before: int = 0) -> None:
    room.hold_bytes(count, before=before, drain_seconds=lambda: 1.0)


def key(**limits: float) -> KeyEntry:
    return KeyEntry.model_validate({"name": "alice", "sha256": "0" * 64, "scopes": ["classify"], **limits})


def test_bytes_held_elsewhere_are_not_here_to_be_held(mapped: Callable[[int], Sums]) -> None:
    first, second = room(mapped(0)), room(mapped(1))
    for _ in range(10):
        hold(first, 90)
    with pytest.raises(Overloaded):
        hold(second, 101)
    hold(second, 100)
    first.free_bytes(90)
    hold(second, 90)
    with pytest.raises(Overloaded):
        hold(first, 1)


def test_what_was_refused_is_not_held(mapped: Callable[[int], Sums]) -> None:
    first, second = room(mapped(0)), room(mapped(1))
    with pytest.raises(Overloaded):
        hold(first, 1001)
    for _ in range(10):
        hold(second, 100)


def test_large_bodies_elsewhere_leave_small_ones_their_part(mapped: Callable[[int], Sums]) -> None:
    first, second = room(mapped(0)), room(mapped(1))
    hold(first, 450)
    with pytest.raises(Overloaded):
        hold(second, 101)
    hold(second, 100)


def test_images_of_a_class_count_for_all(mapped: Callable[[int], Sums]) -> None:
    first, second = room(mapped(0)), room(mapped(1))
    for _ in range(6):
        first.require(1, batch=False, drain_seconds=lambda: 1.0)
        first.hold_images(1, batch=False)
    assert second.full(batch=False)
    assert second.crowded
    assert not second.full(batch=True)
    with pytest.raises(Overloaded):
        second.require(1, batch=False, drain_seconds=lambda: 1.0)
    second.require(2, batch=True, drain_seconds=lambda: 1.0)
    with pytest.raises(Overloaded):
        second.require(3, batch=True, drain_seconds=lambda: 1.0)
    first.free_images(1, batch=False)
    second.require(1, batch=False, drain_seconds=lambda: 1.0)
    assert first.images == 5


def test_the_row_of_a_worker_that_died_is_cleared(mapped: Callable[[int], Sums]) -> None:
    supervisor, dead, alive = mapped(2), mapped(0), mapped(1)
    for _ in range(10):
        hold(room(dead), 100)
    hold(first := room(dead), 100)
    usage, entry = SharedUsage(dead, "alice"), key(max_concurrent=1)
    usage.begin(entry)
    supervisor.clear(0)
    hold(room(alive), 100)
    SharedUsage(alive, "alice").begin(entry)
    assert first.bytes == 100


def test_requests_of_a_key_in_work_count_for_all(mapped: Callable[[int], Sums]) -> None:
    first, second, entry = SharedUsage(mapped(0), "alice"), SharedUsage(mapped(1), "alice"), key(max_concurrent=2)
    started = first.begin(entry)
    second.begin(entry)
    with pytest.raises(KeyLimited):
        second.begin(entry)
    SharedUsage(mapped(2), "bob").begin(key(max_concurrent=1))
    first.end(started)
    second.begin(entry)


def test_the_rate_of_a_key_holds_for_all_and_a_refusal_costs_nothing(mapped: Callable[[int], Sums]) -> None:
    clock = Clock()
    usages = [SharedUsage(mapped(row), "alice", clock) for row in (0, 1)]
    entry = key(requests_per_second=10, burst=4)
    for number in range(4):
        usages[number % 2].begin(entry)
    for usage in usages * 3:
        with pytest.raises(KeyLimited) as refused:
            usage.begin(entry)
        assert refused.value.retry_after_s == pytest.approx(0.1)
    clock.now += 0.1
    usages[1].begin(entry)
    with pytest.raises(KeyLimited):
        usages[0].begin(entry)
    clock.now += 100
    for number in range(4):
        usages[number % 2].begin(entry)
    with pytest.raises(KeyLimited):
        usages[0].begin(entry)


def test_keys_have_places_that_all_processes_agree_on(mapped: Callable[[int], Sums]) -> None:
    first, second = mapped(0), mapped(1)
    names = [f"key-{number}" for number in range(300)]
    found = [first.key(name) for name in names]
    assert len(set(found)) == 300
    assert [second.key(name) for name in reversed(names)] == found[::-1]


def test_a_killed_process_leaves_the_lock_free_and_its_row_to_be_cleared(
    tmp_path: Path, mapped: Callable[[int], Sums]
) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from service.workers.sums import Sums\n"
        "sums = Sums(Path(sys.argv[1]), rows=3, row=0); sums.hold(2, 1000)\n"
        "with sums.locked(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "sums")], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    sums = mapped(1)
    assert sums.others()[2] == 1000
    assert sums.take_token(sums.key("alice") or 0, rate=1, burst=1, now=1.0) == 0
    sums.clear(0)
    assert sums.others() == (0, 0, 0, 0)


def test_a_process_that_was_stopped_with_the_lock_holds_up_nobody(mapped: Callable[[int], Sums]) -> None:
    stopped, other = mapped(0), mapped(1)
    place = other.key("alice")
    assert place is not None
    with stopped.locked():
        assert other.take_token(place, rate=1, burst=1, now=1.0) == 0


def test_the_file_takes_hardly_any_disk(tmp_path: Path, mapped: Callable[[int], Sums]) -> None:
    mapped(0).key("alice")
    assert os.stat(tmp_path / "sums").st_blocks * 512 < 100_000  # noqa: PTH116
