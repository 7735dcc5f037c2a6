"""The watchdog over the engine's lanes: a run that takes longer than it can need counts as hung.

While a run hangs, whoever waits for the engine gets NotReady, and so does every new request. If it comes back, the
service goes on. If it does not, the process ends with a distinct exit status, so that a supervisor starts it again:
native code cannot be interrupted, and its thread would hold its cores for ever. One lane that hangs is enough: it may
hold what the others wait for.

Only time in which this process ran counts. A process that was stopped (SIGSTOP, a suspended machine, a paused
container) finds its engine where it left it.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from service.logs import leave_at_once

log = structlog.get_logger()

EXIT_STATUS = 70
"""Exit status of a process whose engine hangs: `EX_SOFTWARE` of sysexits.h, which nothing else here ends with."""

_TICK_SECONDS = 1.0
"""Longest time between two looks at the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a run of the engine may take, as the settings `hang_*` describe it."""

    factor: float = 20.0
    min_seconds: float = 10.0
    max_seconds: float = 120.0
    exit_seconds: float = 30.0

    def limit(self, predicted: float | None) -> float:
        """Seconds after which a run counts as hung; None: nothing is known about it."""
        if predicted is None:
            return self.max_seconds
        return min(max(self.factor * predicted, self.min_seconds), self.max_seconds)


@dataclass(slots=True, eq=False, kw_only=True)
class Run:
    """What a lane of the engine is doing."""

    what: str
    """For messages."""
    started: float
    """On the scheduler's clock."""
    predicted: float | None
    """Seconds, by the cost model; None if nothing is known."""
    slowed: float = 1.0
    """Factor by which others may slow it down, because it lets them go first."""


def end_process(reason: str) -> None:
    """End this process at once, without waiting for any thread, with EXIT_STATUS and one line in the log."""
    log.critical("the process ends without its engine", reason=reason, exit_status=EXIT_STATUS)
    leave_at_once(EXIT_STATUS)


class Watchdog:
    """Looks at what the engine's lanes are doing, from the event loop."""

    def __init__(
        self,
        patience: Patience,
        clock: Callable[[], float],
        *,
        current: Callable[[], Sequence[Run]],
        on_hang: Callable[[str], None],
        leave: Callable[[str], None] = end_process,
    ) -> None:
        """`current`: what is running; `on_hang` is called once for a run that hangs, `leave` if it does not come back.

        Both get the reason.
        """
        self._patience, self._clock = patience, clock
        self._current, self._on_hang, self._leave = current, on_hang, leave
        self._seconds: dict[Run, float] = {}
        """Time that this process had since each run began."""
        self._hung: dict[Run, str] = {}
        self._looked_at = clock()
        self._interval = min(_TICK_SECONDS, patience.min_seconds / 4)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def hang(self) -> str | None:
        """Why the engine counts as hung; None once it has come back."""
        # Read once: several threads ask for it, and the event loop sets it. The lane may have gone on since then.
        hung = self._hung
        return next((hung[run] for run in self._current() if run in hung), None) if hung else None

    def start(self) -> None:
        """Look at regular intervals, until `stop`. On the event loop."""
        self._looked_at = self._clock()
        self._again()

    def stop(self) -> None:
        """Stop looking."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def look(self) -> None:
        """Look once."""
        now, runs = self._clock(), self._current()
        # After a pause of the whole process, the time that the engine has run in it is unknown: count two intervals at
        # most.
        lived = min(now - self._looked_at, 2 * self._interval)
        self._looked_at = now
        before = self._seconds
        self._seconds = {run: before[run] + lived if run in before else min(now - run.started, lived) for run in runs}
        for run in self._hung:
            if run not in self._seconds:
                log.warning("the engine has come back", after_seconds=round(before[run], 1))
        hung = {run: reason for run, reason in self._hung.items() if run in self._seconds}
        for run, seconds in self._seconds.items():
            limit = self._patience.limit(run.predicted) * run.slowed
            if run in hung:
                if seconds > limit + self._patience.exit_seconds:
                    self._leave(f"the engine has been at {run.what} for {seconds:.0f} s")
            elif seconds > limit:
                hung[run] = f"the engine has been at {run.what} for over {limit:.3g} s"
        new = [reason for run, reason in hung.items() if run not in self._hung]
        self._hung = hung
        for reason in new:
            log.error("the engine hangs", reason=reason)
            self._on_hang(reason)

    def _again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._tick)

    def _tick(self) -> None:
        self._again()
        self.look()
