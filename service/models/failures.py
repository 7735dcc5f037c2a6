"""Which versions could not be loaded, and when it is worth trying them again.

A bundle never changes once it is published, but its folder may be found half-written, or without permission to read it,
and the machine may have lacked a resource for a moment.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.bundle import Signature, signature
from service.errors import NotNow
from service.models.machine import is_of_the_moment

Key = tuple[str, int]
"""Name and version."""

_MAX_PAUSE = 63
"""Most polls between two attempts: an attempt may take minutes of CPU time."""


@dataclass(slots=True)
class _Failure:
    seen: Signature | None
    reason: str
    needed_bytes: int | None
    """Memory without which another attempt is pointless, 0 if unknown; None if the failure is not temporary."""
    attempts: int
    """How often it failed with the folder as it is."""
    pause: int
    """Polls to skip before the next attempt, unless the memory needed decides when to make it."""


class Failures:
    """The versions of one repository that could not be loaded."""

    def __init__(self, memory_left: Callable[[], int | None]) -> None:
        self._memory_left = memory_left
        self._known: dict[Key, _Failure] = {}

    def worth_trying(self, key: Key, folder: Path) -> bool:
        """Whether a version has not failed before, or the cause of its failure may be gone."""
        failure = self._known.get(key)
        if failure is None or signature(folder) != failure.seen:
            return True
        if failure.needed_bytes is None:
            return False
        left = self._memory_left()
        if failure.needed_bytes and left is not None:
            return failure.needed_bytes <= left
        if failure.pause:
            failure.pause -= 1
            return False
        return True

    def record(self, key: Key, seen: Signature | None, error: Exception) -> bool:
        """Record that a version, `seen` before it was read, could not be loaded; returns whether that is news."""
        known, reason = self._known.get(key), str(error)
        needed = error.needed_bytes if isinstance(error, NotNow) else 0 if is_of_the_moment(error) else None
        attempts = known.attempts + 1 if known and known.seen == seen else 1
        # 0 after the first attempt, then 1, 3, 7 and so on.
        pause = min(2 ** (attempts - 1) - 1, _MAX_PAUSE)
        self._known[key] = _Failure(seen, reason, needed, attempts, pause)
        return known is None or known.reason != reason

    def forget(self, key: Key) -> None:
        """The version was loaded, or is gone."""
        self._known.pop(key, None)
