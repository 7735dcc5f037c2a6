"""Which versions could not be loaded, and when it is worth trying them again.

A bundle never changes once it is published, but its folder may be found half-written, or without the rights to read it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.bundle import Signature, signature
from service.errors import NotNow

Key = tuple[str, int]
"""Name and version."""


@dataclass(frozen=True, slots=True)
class _Failure:
    seen: Signature | None
    reason: str
    needed_bytes: int | None
    """Memory without which there is no use in trying again; None if it is not a matter of memory or of the moment."""


class Failures:
    """The versions of one repository that could not be loaded."""

    def __init__(self, memory_left: Callable[[], int | None]) -> None:
        self._memory_left = memory_left
        self._known: dict[Key, _Failure] = {}

    def worth_trying(self, key: Key, folder: Path) -> bool:
        """Whether a version did not fail before, or what made it fail may be over."""
        failure = self._known.get(key)
        if failure is None or signature(folder) != failure.seen:
            return True
        if failure.needed_bytes is None:
            return False
        left = self._memory_left()
        return left is None or failure.needed_bytes <= left

    def record(self, key: Key, seen: Signature | None, error: Exception) -> bool:
        """Record that a version, `seen` before it was read, could not be loaded; returns whether that is news."""
        known, reason = self._known.get(key), str(error)
        needed = error.needed_bytes if isinstance(error, NotNow) else None
        self._known[key] = _Failure(seen, reason, needed)
        return known is None or known.reason != reason

    def forget(self, key: Key) -> None:
        """The version was loaded, or is gone."""
        self._known.pop(key, None)
