"""Log lines about events as frequent as requests: now and then one line of each kind, which covers those before it."""

import math
from collections import Counter
from collections.abc import Callable

_SECONDS = 10.0
"""Shortest time between two lines of one kind."""


class LogThrottle:
    """Decides which events get a line. Not thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._logged_at: dict[str, float] = {}
        self._passed_over: Counter[str] = Counter()

    def passed_over(self, kind: str) -> int | None:
        """Count an event of a kind. None if it gets no line, else the number of those before it that got none."""
        now = self._clock()
        if now - self._logged_at.get(kind, -math.inf) < _SECONDS:
            self._passed_over[kind] += 1
            return None
        self._logged_at[kind] = now
        return self._passed_over.pop(kind, 0)
