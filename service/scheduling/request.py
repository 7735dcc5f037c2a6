"""The state of one request: its deadline, its priority, and whether its client is still connected."""

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self, TypeVar

from service.errors import ClientDisconnected, DeadlineExceeded

T = TypeVar("T")
Priority = Literal["interactive", "batch"]

_numbers = itertools.count()


class Key(NamedTuple):
    """The order of work: interactive before batch, then the earliest deadline, then first come."""

    batch: bool
    deadline: float
    number: int


class RequestState:
    """Read wherever work for a request may begin: nothing is done once it is `over`.

    Entered as a context on the event loop, it ends the request at its deadline by the loop's own timer: a task that
    awaits other threads with `wait` gets the error at that moment, even while those threads hang.
    """

    __slots__ = ("_awaited", "_clock", "_expired", "_timer", "arrived_at", "deadline", "disconnected", "key")

    def __init__(
        self,
        *,
        seconds: float,
        priority: Priority = "interactive",
        arrived_at: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """A request that must be answered within `seconds` of `arrived_at` on the `clock` (default: now)."""
        self._clock = clock
        self.arrived_at = clock() if arrived_at is None else arrived_at
        self.deadline = self.arrived_at + seconds
        self.key = Key(priority == "batch", self.deadline, next(_numbers))
        self.disconnected = False
        self._awaited: set[asyncio.Future[Any]] = set()
        self._expired = False
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._arm()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def amend(self, *, seconds: float | None = None, priority: Priority | None = None) -> None:
        """Apply what the body says: an earlier deadline, another priority. Only before the work is accepted."""
        if seconds is not None and self.arrived_at + seconds < self.deadline:
            self._set_deadline(seconds)
        batch = self.key.batch if priority is None else priority == "batch"
        self.key = Key(batch, self.deadline, self.key.number)

    def replace(self, *, seconds: float, priority: Priority) -> None:
        """Set another deadline, even a later one, and another priority than the headers. Only before it is accepted."""
        self._set_deadline(seconds)
        self.key = Key(priority == "batch", self.deadline, self.key.number)

    def over(self, now: float) -> bool:
        """Whether nothing more should be done for the request."""
        return self._expired or self.disconnected or now > self.deadline

    def error(self, when: str) -> ClientDisconnected | DeadlineExceeded:
        """The error of a request that is over, and for which nothing was computed."""
        return (
            self._over_error()
            if self.disconnected
            else DeadlineExceeded(f"the deadline passed {when}: nothing was computed")
        )

    async def wait(self, result: "asyncio.Future[T]") -> T:
        """Wait for another thread's result; on the event loop. Raises the request's error once it is over."""
        if self._expired or self.disconnected:
            result.cancel()
            raise self._over_error()
        self._awaited.add(result)
        try:
            return await result
        finally:
            self._awaited.discard(result)
            # A caller may be cancelled just when its result becomes an error, which nobody else would retrieve.
            if result.done() and not result.cancelled():
                result.exception()
            # Its error refers to this frame through the traceback: the cycle would keep the callers' images alive.
            del result

    def leave(self) -> None:
        """The client has closed its connection. On the event loop."""
        self.disconnected = True
        self._end()

    def expire(self) -> None:
        """The deadline has passed. On the event loop."""
        self._expired = True
        self._end()

    def _set_deadline(self, seconds: float) -> None:
        self.deadline = self.arrived_at + seconds
        # The timer of the deadline from the headers may have been called already.
        self._expired = False
        if self._timer is not None:
            self._timer.cancel()
            self._arm()

    def _arm(self) -> None:
        delay = max(0.0, self.deadline - self._clock())
        self._timer = asyncio.get_running_loop().call_later(delay, self.expire)

    def _end(self) -> None:
        for result in self._awaited:
            if not result.done():
                # Each gets its own: an exception that several tasks raise collects the tracebacks of all.
                result.set_exception(self._over_error())

    def _over_error(self) -> ClientDisconnected | DeadlineExceeded:
        if self.disconnected:
            return ClientDisconnected("the client has closed the connection")
        return DeadlineExceeded("the deadline passed before the answer was ready: ask again with a later deadline")
