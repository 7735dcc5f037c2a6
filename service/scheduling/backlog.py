"""The work accepted for one model and not yet done: how many images, of which requests, in which stage."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from service.scheduling.cost import LARGE_WORK
from service.scheduling.request import RequestState


@dataclass(slots=True, eq=False)
class Work:
    """What is left to do: of one request, or of all requests of a priority class. Only its backlog changes it."""

    waiting: int = 0
    """Images that the engine has not answered yet."""
    undecoded: int = 0
    """Those of them that are not pixels yet."""
    small: int = 0
    """Decoding work in the lane for small images, in pixels."""
    large: int = 0
    """Decoding work in the lane for large ones."""
    large_images: int = 0
    """Images in that lane, or waiting for it."""

    def add(self, other: "Work", sign: int = 1) -> None:
        """Add another's work, or subtract it with -1."""
        self.waiting += sign * other.waiting
        self.undecoded += sign * other.undecoded
        self.small += sign * other.small
        self.large += sign * other.large
        self.large_images += sign * other.large_images


def work_of(images: int, decoding: Sequence[int]) -> Work:
    """The work of `images` images; `decoding` has the work of decoding each, in pixels; empty if there is none."""
    large = [work for work in decoding if work > LARGE_WORK]
    return Work(
        waiting=images,
        undecoded=len(decoding),
        small=sum(decoding) - sum(large),
        large=sum(large),
        large_images=len(large),
    )


class Backlog:
    """The counters of one queue. Changed on the event loop only, except for `decoding`."""

    def __init__(self) -> None:
        self.of_class = Work(), Work()
        """All interactive work, and all batch work."""
        self.decoding = {False: 0, True: 0}
        """Images in the decode pool, excluding those in its lane for large ones, by whether they are batch work. The
        scheduler's lock guards it."""
        self.coming: tuple[deque[float], deque[float]] = deque(), deque()
        """Arrival times of requests that may be in time, and whose images are not known yet: interactive and batch."""
        self._works: dict[RequestState, Work] = {}

    @property
    def waiting(self) -> int:
        """Images that the engine has not answered yet."""
        return self.of_class[0].waiting + self.of_class[1].waiting

    @property
    def undecoded(self) -> int:
        """Those of them that are not pixels yet."""
        return self.of_class[0].undecoded + self.of_class[1].undecoded

    @property
    def in_decoding(self) -> int:
        """Images in the decode pool, excluding those in its lane for large ones."""
        return self.decoding[False] + self.decoding[True]

    def accept(self, state: RequestState, work: Work) -> Work:
        """Add a request's work, which the backlog owns from now on."""
        self._works[state] = work
        self.of_class[state.key.batch].add(work)
        return work

    def decoded(self, state: RequestState, work: int) -> None:
        """One image of the request, with this decoding work, has been decoded, or has failed to be."""
        if left := self._works.get(state):
            for each in (left, self.of_class[state.key.batch]):
                each.undecoded -= 1
                if work > LARGE_WORK:
                    each.large -= work
                    each.large_images -= 1
                else:
                    each.small -= work

    def answered(self, state: RequestState) -> None:
        """The engine has nothing more to do for one image of the request."""
        if left := self._works.get(state):
            left.waiting -= 1
            self.of_class[state.key.batch].waiting -= 1

    def release(self, state: RequestState) -> None:
        """The request is answered: what is left of its work no longer counts."""
        if left := self._works.pop(state, None):
            self.of_class[state.key.batch].add(left, -1)
