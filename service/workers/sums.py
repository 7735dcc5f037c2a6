"""Limits that hold for the sum of several processes, in a small file that all of them map.

Each process writes what it holds into a row of its own, and reads those of the others; no process waits for another. It
first announces what it wants and then checks whether the sum is within the limit, so two that want the last room at the
same time may both be refused, but not both be served. The supervisor clears the row of a process that has died.

Only the rate of a key is a single value for all. It is changed under a lock of the file, which the system frees when
its owner dies.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import structlog

from service.keys import KeyEntry, Usage, beyond_rate
from service.scheduling.room import Room

log = structlog.get_logger()

_WORD: Final = 8
_ROOM: Final = 4
"""Words of a row: images of each priority class, bytes, and bytes of large bodies."""
KEYS: Final = 32_768
"""Keys with limits that there is room for: a key file has at most some 20,000."""
_DIGEST: Final = 16
_LOCK_SECONDS: Final = 0.05
"""A process that was stopped while it had the lock holds up the others no longer than this: they go on without it."""


class Sums:
    """The file, as one process maps it."""

    def __init__(self, path: Path, *, rows: int, row: int) -> None:
        """`row`: that of this process, out of `rows`. Creates the file if there is none."""
        self.row, self._rows = row, rows
        room, names = rows * _ROOM * _WORD, KEYS * _DIGEST
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = room + names + KEYS * _WORD + rows * KEYS * _WORD
        # Pages that nobody writes to take no memory.
        if os.fstat(self._file).st_size < size:
            os.ftruncate(self._file, size)
        self._map = mmap.mmap(self._file, size)
        view = memoryview(self._map)
        parts, begin = [], 0
        for length in (room, names, KEYS * _WORD, rows * KEYS * _WORD):
            parts.append(view[begin : begin + length])
            begin += length
        self._room, self._names = parts[0].cast("q"), parts[1]
        self._due, self._in_work = parts[2].cast("d"), parts[3].cast("q")

    def hold(self, at: int, value: int) -> None:
        """Set one word of this process's room: how much it holds."""
        self._room[self.row * _ROOM + at] = value

    def others(self) -> tuple[int, int, int, int]:
        """What all other processes hold."""
        words = self._room.tolist()
        mine = self.row * _ROOM
        images, batch, size, large = (sum(words[at::_ROOM]) - words[mine + at] for at in range(_ROOM))
        return images, batch, size, large

    def key(self, name: str) -> int | None:
        """The place of a key, the same for all; None if there are too many."""
        digest = hashlib.blake2b(name.encode(), digest_size=_DIGEST).digest()
        with self.locked():
            for step in range(KEYS):
                at = (int.from_bytes(digest[:_WORD], "little") + step) % KEYS
                found = bytes(self._names[at * _DIGEST : (at + 1) * _DIGEST])
                if found == digest:
                    return at
                if not any(found):
                    self._names[at * _DIGEST : (at + 1) * _DIGEST] = digest
                    return at
        return None

    def work(self, key: int, value: int) -> None:
        """Set how many requests of a key this process has in work."""
        self._in_work[self.row * KEYS + key] = value

    def work_of_others(self, key: int) -> int:
        """How many requests of a key all other processes have in work."""
        return sum(self._in_work[row * KEYS + key] for row in range(self._rows) if row != self.row)

    def take_token(self, key: int, *, rate: float, burst: float, now: float) -> float:
        """Take one of a key's tokens; returns 0 if there was one, otherwise the seconds until there is.

        `now` is of `time.perf_counter`, which is the same for all processes of a machine (Linux).
        """
        with self.locked():
            # When the bucket is full again (the generic cell rate algorithm): one value for tokens and time.
            due = max(self._due[key], now)
            late = due - now - (burst - 1) / rate
            if late > 1e-9:
                return late
            self._due[key] = due + 1 / rate
            return 0.0

    def clear(self, row: int) -> None:
        """Clear the row of a process that has died: it holds nothing."""
        for at in range(_ROOM):
            self._room[row * _ROOM + at] = 0
        mine = self._in_work[row * KEYS : (row + 1) * KEYS]
        mine[:] = memoryview(bytes(len(mine) * _WORD)).cast("q")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclusive access to the values that all processes write."""
        until = time.monotonic() + _LOCK_SECONDS
        owned = False
        while not owned and time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                owned = True
        try:
            yield
        finally:
            if owned:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Unmap the file. What refers to it cannot be used any more."""
        for part in (self._room, self._names, self._due, self._in_work):
            part.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SharedRoom(Room):
    """The room of a process, less what the others have taken."""

    def __init__(self, sums: Sums, **bounds: Any) -> None:
        super().__init__(**bounds)
        self._sums = sums
        self._all = self._max_images, self._max_of_class, self._max_bytes, self._max_large_bytes
        self._others = (0, 0)

    @property
    def crowded(self) -> bool:
        """Whether a priority class may be without room."""
        self._look()
        return self.images >= self._max_of_class - max(self._others)

    def full(self, *, batch: bool) -> bool:
        """Whether there is no room for one more image of the priority class."""
        self._look()
        most = self._max_of_class - self._others[batch]
        return self.images >= self._max_images or self._images_of_class[batch] >= most

    def require(self, images: int, *, batch: bool, drain_seconds: Callable[[], float]) -> None:
        """Raise Overloaded unless there is room for `images` more of the priority class."""
        self._look()
        self._max_of_class -= self._others[batch]
        super().require(images, batch=batch, drain_seconds=drain_seconds)

    def hold_images(self, count: int, *, batch: bool) -> None:
        """Account for accepted images."""
        super().hold_images(count, batch=batch)
        self._sums.hold(batch, self._images_of_class[batch])

    def require_bytes(self, count: int, *, before: int, drain_seconds: Callable[[], float]) -> None:
        """Raise Overloaded unless a body of `before` bytes so far can be held with `count` more."""
        self._look()
        super().require_bytes(count, before=before, drain_seconds=drain_seconds)

    def hold_bytes(self, count: int, *, before: int, drain_seconds: Callable[[], float]) -> None:
        """Account for `count` more bytes of a body. Raises Overloaded if there is no room for them."""
        self._sums.hold(2, self.bytes + count)
        self._sums.hold(3, self._large_bytes + self._large(before + count) - self._large(before))
        try:
            super().hold_bytes(count, before=before, drain_seconds=drain_seconds)
        finally:
            self._announce()

    def free_bytes(self, count: int) -> None:
        """Account for a body that is no longer held."""
        super().free_bytes(count)
        self._announce()

    def _announce(self) -> None:
        self._sums.hold(2, self.bytes)
        self._sums.hold(3, self._large_bytes)

    def _look(self) -> None:
        """Subtract what the others hold from the limits."""
        *images, size, large = self._sums.others()
        self._others = images[0], images[1]
        most_images, self._max_of_class, most_bytes, most_large = self._all
        self._max_images, self._max_bytes, self._max_large_bytes = (
            most_images - sum(images),
            most_bytes - size,
            most_large - large,
        )


class SharedUsage(Usage):
    """The use of a key, whose limits hold for all processes."""

    def __init__(self, sums: Sums, name: str, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(clock)
        self._sums, self._name = sums, name
        self._place: int | None = None

    def begin(self, entry: KeyEntry) -> float:
        """Count one more request in work. Raises KeyLimited."""
        if entry.max_concurrent is None and entry.requests_per_second is None:
            return super().begin(entry)
        if self._place is None:
            self._place = self._sums.key(self._name)
            if self._place is None:
                log.warning("too many keys have limits: those of this one hold for each worker", key=self._name)
                return super().begin(entry)
        if entry.max_concurrent is not None:
            self._sums.work(self._place, self.in_work + 1)
            self.elsewhere = self._sums.work_of_others(self._place)
        try:
            return super().begin(entry)
        finally:
            self._sums.work(self._place, self.in_work)

    def end(self, started: float) -> None:
        """A request is no longer in work."""
        super().end(started)
        if self._place is not None:
            self._sums.work(self._place, self.in_work)

    def _take_token(self, entry: KeyEntry, rate: float, now: float) -> None:
        if self._place is None:
            super()._take_token(entry, rate, now)
        elif wait := self._sums.take_token(self._place, rate=rate, burst=entry.burst or max(1.0, rate), now=now):
            raise beyond_rate(entry, wait)
