"""A ticket: one request's place in the service, from admission to answer."""

import itertools
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

Priority = Literal["interactive", "batch"]

_numbers = itertools.count()


class Key(NamedTuple):
    """The order of work: interactive before batch, then the earliest deadline, then first come."""

    batch: bool
    deadline: float
    number: int


@dataclass(slots=True)
class Backlog:
    """The work accepted for one model and not yet done, of all tickets together."""

    waiting: int = 0
    undecoded: int = 0


class RequestState:
    """Who is asking, until when, and how much of the work is still to do.

    `deadline` is on `time.perf_counter`'s clock. Once `gone` is set, nothing more is done for the request.
    """

    __slots__ = ("_backlog", "bytes", "deadline", "gone", "images", "key", "since", "undecoded", "waiting")

    def __init__(self, *, seconds: float, priority: Priority = "interactive", since: float | None = None) -> None:
        """A request that arrived at `since` (default: now) and has `seconds` from then."""
        self.since = time.perf_counter() if since is None else since
        self.deadline = self.since + seconds
        self.key = Key(priority == "batch", self.deadline, next(_numbers))
        self.gone = False
        self.images = 0
        """Once they are accepted."""
        self.bytes = 0
        self.waiting = 0
        """Images that the engine has not answered yet."""
        self.undecoded = 0
        """Images that are not pixels yet."""
        self._backlog = Backlog()

    def amend(self, *, seconds: float | None = None, priority: Priority | None = None) -> None:
        """What the body says, read after the head: an earlier deadline, a lower place. Before acceptance only."""
        if seconds is not None:
            self.deadline = min(self.deadline, self.since + seconds)
        batch = self.key.batch if priority is None else priority == "batch"
        self.key = Key(batch, self.deadline, self.key.number)

    def accepted(self, images: int, backlog: Backlog, *, encoded: bool) -> None:
        """From now on the work of the request counts among the `backlog` of its model."""
        self.images = self.waiting = images
        self.undecoded = images if encoded else 0
        self._backlog = backlog
        backlog.waiting += self.waiting
        backlog.undecoded += self.undecoded

    def decoded(self) -> None:
        """One image is pixels now, or cannot be."""
        self.undecoded -= 1
        self._backlog.undecoded -= 1

    def answered(self) -> None:
        """The engine has nothing more to do with one image."""
        self.waiting -= 1
        self._backlog.waiting -= 1

    def leave(self) -> None:
        """The request is answered: what it still had in work counts no longer."""
        self._backlog.waiting -= self.waiting
        self._backlog.undecoded -= self.undecoded
        self._backlog = Backlog()

    @property
    def over(self) -> bool:
        """Whether nothing more should be done for it."""
        return self.gone or time.perf_counter() > self.deadline
