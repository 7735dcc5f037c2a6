"""A ticket: one request's place in the service, from admission to answer."""

import itertools
import time
from typing import Literal, NamedTuple

Priority = Literal["interactive", "batch"]

_numbers = itertools.count()


class Key(NamedTuple):
    """The order of work: interactive before batch, then the earliest deadline, then first come."""

    batch: bool
    deadline: float
    number: int


class Ticket:
    """Who is asking, until when, and how much of the work is still to do.

    `deadline` is on `time.perf_counter`'s clock. Once `gone` is set, nothing more is done for the request.
    """

    __slots__ = ("bytes", "deadline", "gone", "images", "key", "since", "undecoded", "waiting")

    def __init__(self, *, seconds: float, priority: Priority = "interactive", since: float | None = None) -> None:
        """A request that arrived at `since` (default: now) and has `seconds` from then."""
        self.since = time.perf_counter() if since is None else since
        self.deadline = self.since + seconds
        self.key = Key(priority == "batch", self.deadline, next(_numbers))
        self.gone = False
        self.images = 1
        self.bytes = 0
        self.waiting = 0
        """Images that the engine has not answered yet."""
        self.undecoded = 0
        """Images that are not pixels yet."""

    def amend(self, *, seconds: float | None = None, priority: Priority | None = None) -> None:
        """What the body says, read after the head: an earlier deadline, a lower place. Before acceptance only."""
        if seconds is not None:
            self.deadline = min(self.deadline, self.since + seconds)
        batch = self.key.batch if priority is None else priority == "batch"
        self.key = Key(batch, self.deadline, self.key.number)

    @property
    def over(self) -> bool:
        """Whether nothing more should be done for it."""
        return self.gone or time.perf_counter() > self.deadline
