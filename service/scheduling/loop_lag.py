"""How late the event loop is: nothing else sees what queues in front of it."""

import asyncio
import time
from collections.abc import Callable

_INTERVAL_SECONDS = 0.02
_TURNS = 6
"""Turns of the loop that a request takes: in its socket, its headers, its body, decoded, from the engine, written."""

_WINDOW_SECONDS = 15.0

_MOST_SECONDS = 1.0
"""Largest lag: no turn of a busy loop takes longer, and a pause of the whole process (SIGSTOP, a suspended machine)
says nothing about the next turns."""


class LoopLag:
    """Measured by a timer that is due every 20 ms; within a long turn of the loop, by how long it is overdue."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last, self._due = 0.0, float("inf")
        self._worst, self._worst_before, self._window_ends = 0.0, 0.0, 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Measure from now on; on the event loop."""
        self._schedule(self._clock())

    def stop(self) -> None:
        """Stop measuring."""
        if self._timer:
            self._timer.cancel()
        self._last, self._due = 0.0, float("inf")

    @property
    def seconds(self) -> float:
        """How late the loop is: by how much the timer was late, or is by now if that is more."""
        late = min(self._clock() - self._due, _MOST_SECONDS)
        return late if late > self._last else self._last

    @property
    def delay_seconds(self) -> float:
        """What the lag adds to the time of a request."""
        return _TURNS * self.seconds

    @property
    def worst_seconds(self) -> float:
        """The largest lag of the last 15 to 30 seconds."""
        return max(self._worst, self._worst_before, self.seconds)

    def observe(self, late: float, now: float) -> None:
        """Record one lag."""
        late = min(late, _MOST_SECONDS)
        # It at most halves in a turn, so that one short turn does not end the load shedding.
        self._last = max(late, self._last / 2)
        if now > self._window_ends:
            self._worst_before, self._worst, self._window_ends = self._worst, 0.0, now + _WINDOW_SECONDS
        self._worst = max(self._worst, late)

    def _tick(self) -> None:
        now = self._clock()
        self.observe(max(0.0, now - self._due), now)
        self._schedule(now)

    def _schedule(self, now: float) -> None:
        self._due = now + _INTERVAL_SECONDS
        self._timer = asyncio.get_running_loop().call_later(_INTERVAL_SECONDS, self._tick)
