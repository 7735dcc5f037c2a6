"""The state of one request: its deadline, its priority, and whether its client is still connected."""

import itertools
import time
from typing import Literal, NamedTuple

from service.errors import ClientDisconnected, DeadlineExceeded

Priority = Literal["interactive", "batch"]

_numbers = itertools.count()


class Key(NamedTuple):
    """The order of work: interactive before batch, then the earliest deadline, then first come."""

    batch: bool
    deadline: float
    number: int


class RequestState:
    """Read wherever work for a request may begin: nothing is done once it is `over`."""

    __slots__ = ("arrived_at", "deadline", "disconnected", "key")

    def __init__(self, *, seconds: float, priority: Priority = "interactive", arrived_at: float | None = None) -> None:
        """A request that must be answered within `seconds` of `arrived_at` (default: now), a `time.perf_counter`."""
        self.arrived_at = time.perf_counter() if arrived_at is None else arrived_at
        self.deadline = self.arrived_at + seconds
        self.key = Key(priority == "batch", self.deadline, next(_numbers))
        self.disconnected = False

    def amend(self, *, seconds: float | None = None, priority: Priority | None = None) -> None:
        """Apply what the body says: an earlier deadline, another priority. Only before the work is accepted."""
        if seconds is not None:
            self.deadline = min(self.deadline, self.arrived_at + seconds)
        batch = self.key.batch if priority is None else priority == "batch"
        self.key = Key(batch, self.deadline, self.key.number)

    def replace(self, *, seconds: float, priority: Priority) -> None:
        """Another deadline, also a later one, and another priority than the head said. Only before it is accepted."""
        self.deadline = self.arrived_at + seconds
        self.key = Key(priority == "batch", self.deadline, self.key.number)

    def over(self, now: float) -> bool:
        """Whether nothing more should be done for the request."""
        return self.disconnected or now > self.deadline

    def error(self, when: str) -> ClientDisconnected | DeadlineExceeded:
        """The error of a request that is over."""
        if self.disconnected:
            return ClientDisconnected("the client has closed the connection")
        return DeadlineExceeded(f"the deadline passed {when}: nothing was computed")
