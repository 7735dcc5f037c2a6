"""The work accepted for one model and not yet done: how many images, of which requests, in which stage."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.scheduling.request import RequestState


@dataclass(slots=True, eq=False)
class Work:
    """One request's part of a backlog, which alone changes it."""

    waiting: int
    undecoded: int


class Backlog:
    """The counters of one queue. Changed on the event loop only; the engine thread reads `decoding`."""

    def __init__(self) -> None:
        self.waiting = 0
        """Images that the engine has not answered yet."""
        self.undecoded = 0
        """Those of them that are not pixels yet."""
        self.decoding = {False: 0, True: 0}
        """Images in the decode pool, without those in its lane for large ones, by whether they are batch work."""
        self._works: dict[RequestState, Work] = {}

    def accept(self, state: RequestState, images: int, *, encoded: bool) -> Work:
        """Add a request's images, which need decoding if they are `encoded`."""
        work = self._works[state] = Work(waiting=images, undecoded=images if encoded else 0)
        self.waiting += work.waiting
        self.undecoded += work.undecoded
        return work

    def decoded(self, state: RequestState) -> None:
        """One image of the request is pixels now, or has failed to be."""
        if work := self._works.get(state):
            work.undecoded -= 1
            self.undecoded -= 1

    def answered(self, state: RequestState) -> None:
        """The engine has nothing more to do for one image of the request."""
        if work := self._works.get(state):
            work.waiting -= 1
            self.waiting -= 1

    def release(self, state: RequestState) -> None:
        """The request is answered: what is left of its work counts no longer."""
        if work := self._works.pop(state, None):
            self.waiting -= work.waiting
            self.undecoded -= work.undecoded

    @contextmanager
    def in_decode_pool(self, state: RequestState) -> Iterator[None]:
        """One image of the request is in the decode pool, until the block ends."""
        batch = state.key.batch
        self.decoding[batch] += 1
        try:
            yield
        finally:
            self.decoding[batch] -= 1
