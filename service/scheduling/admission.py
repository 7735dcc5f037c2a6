"""Admission: a request is taken only if there is room for it and it can finish in time; else it gets 429 at once.

Two bounds, on the images and on the bytes of all requests, keep memory flat. The predicted finish of a request, by the
cost model and the work ahead of it in the order of its `Key`, is compared with its deadline. A request is also rejected
if it would make one that was accepted earlier miss its deadline.
"""

import math
from collections import Counter
from typing import Self

from service.errors import Overloaded
from service.scheduling.backlog import Work
from service.scheduling.cost import Load
from service.scheduling.request import Key, RequestState
from service.scheduling.scheduler import Queue, Scheduler


class Admission:
    """All requests being answered, and what they will cost."""

    def __init__(
        self, scheduler: Scheduler, load: Load, *, max_pending_images: int, max_pending_bytes: int, margin: float
    ) -> None:
        """`margin`: the fraction of its deadline within which a request must be predicted to finish."""
        self._scheduler, self._load, self._clock = scheduler, load, load.clock
        self._max_images, self._max_bytes, self._margin = max_pending_images, max_pending_bytes, margin
        self._accepted: dict[RequestState, tuple[Queue, Work]] = {}
        self._last: Key | None = None
        """No accepted request comes after this one, which may have been answered in the meantime."""
        self._version = 0
        """Changes with the accepted work."""
        self._ahead: tuple[Key, int, Counter[Queue], int] | None = None
        """The last request asked about, and the work ahead of it: one request is predicted for several models."""
        self.images = 0
        """Images accepted and not yet answered."""
        self.bytes = 0
        """Bytes of bodies accepted and not yet answered."""

    def admit(self, state: RequestState, queue: Queue, *, encoded: bool) -> "Place":
        """Room for a request whose body is not yet read: enter it as a context, and leave it when all is answered.

        `queue` is that of the fastest model that may answer; `encoded` says whether the images will need decoding.
        Raises Overloaded if one image could not finish in time, or if there is no room for one. Images take up room
        only once they are accepted: a slow sender takes up bytes, but nobody else's room.
        """
        self.require_in_time(state, self.predict(queue, state, encoded=encoded))
        self._require_room(1)
        return Place(self, state)

    def hold_bytes(self, place: "Place", count: int) -> None:
        """Account for more bytes of a body. Raises Overloaded if all bodies together would be too large."""
        if self.bytes + count > self._max_bytes:
            raise Overloaded(
                f"{self.bytes:,} bytes are pending and {self._max_bytes:,} are allowed: "
                "nothing was done for this request, send it again later",
                reason="bytes",
                retry_after_s=self.drain_seconds(),
            )
        self.bytes += count
        place.bytes += count

    def accept(self, place: "Place", queue: Queue, images: int, *, encoded: bool) -> None:
        """Accept a request's images. Raises Overloaded if they cannot finish in time or there is no room for them."""
        state = place.state
        self._require_room(images)
        self.require_in_time(state, self.predict(queue, state, images, encoded=encoded))
        if not self._is_last(state) and (late := self._seconds_late(state, queue, images)):
            raise Overloaded(
                "this request would make an earlier one miss its deadline: "
                "nothing was done for it, send it again later or with a later deadline",
                reason="deadline",
                retry_after_s=late,
            )
        self.images += images
        self._version += 1
        place.images = images
        self._accepted[state] = queue, queue.backlog.accept(state, images, encoded=encoded)
        self._last = max(self._last, state.key) if self._last else state.key

    def release(self, place: "Place") -> None:
        """Free all that a request holds."""
        self.images -= place.images
        self.bytes -= place.bytes
        self._version += 1
        if accepted := self._accepted.pop(place.state, None):
            accepted[0].backlog.release(place.state)

    def require_in_time(self, state: RequestState, predicted: float) -> None:
        """Raise Overloaded if `predicted` seconds from now are too late for the request."""
        allowed = self.allowed_seconds(state)
        if predicted > allowed:
            raise Overloaded(
                f"the deadline leaves {max(0.0, allowed) * 1000:.0f} ms and the work ahead takes about "
                f"{predicted * 1000:.0f} ms: nothing was done for this request, send it again later or with a later "
                "deadline",
                reason="deadline",
                retry_after_s=predicted - allowed,
            )

    def allowed_seconds(self, state: RequestState) -> float:
        """Seconds from now within which the request must be predicted to finish."""
        return self._margin * (state.deadline - state.arrived_at) - (self._clock() - state.arrived_at)

    def predict(self, queue: Queue, state: RequestState, images: int = 1, *, encoded: bool = True) -> float:
        """Predicted seconds from now until a request of `images` for `queue` is answered."""
        ahead, undecoded = self._work_ahead(state)
        work = ahead + Counter({queue: images})
        # The running batch is finished first, also if the request overtakes everything else.
        done, left = self._running()
        engine = max(left + queue.cost.total(images), _seconds(work) - done)
        if not encoded:
            return engine
        # Decoding and inference overlap, except for the last image's own decoding and batch.
        decode = self._decode_seconds(undecoded + images)
        last = queue.cost.total(min(images, queue.cost.limit))
        return max(decode + last, engine + self._load.decode_seconds)

    def drain_seconds(self) -> float:
        """Predicted seconds until all accepted work is done."""
        work, undecoded = self._all_work()
        return max(0.0, _seconds(work) - self._running()[0], self._decode_seconds(undecoded))

    def _is_last(self, state: RequestState) -> bool:
        """Whether all accepted work comes before the request's, which is so if all have the same deadline."""
        if self._last is None or state.key > self._last:
            return True
        self._last = max((other.key for other in self._accepted), default=None)
        return self._last is None or state.key > self._last

    def _work_ahead(self, state: RequestState) -> tuple[Counter[Queue], int]:
        """Images that the engine answers before the request's, by queue, and those of them to be decoded."""
        if self._is_last(state):
            return self._all_work()
        if self._ahead is None or self._ahead[:2] != (state.key, self._version):
            work, undecoded = Counter[Queue](), 0
            for other, (queue, pending) in self._accepted.items():
                if other.key < state.key:
                    work[queue] += pending.waiting
                    undecoded += pending.undecoded
            self._ahead = state.key, self._version, work, undecoded
        return self._ahead[2], self._ahead[3]

    def _all_work(self) -> tuple[Counter[Queue], int]:
        work, undecoded = Counter[Queue](), 0
        for queue in self._scheduler.queues:
            if queue.backlog.waiting:
                work[queue] = queue.backlog.waiting
            undecoded += queue.backlog.undecoded
        return work, undecoded

    def _require_room(self, images: int) -> None:
        if self.images + images > self._max_images:
            raise Overloaded(
                f"{self.images} images are pending and {self._max_images} are allowed: "
                "nothing was done for this request, send it again later",
                reason="images",
                retry_after_s=self.drain_seconds(),
            )

    def _seconds_late(self, state: RequestState, queue: Queue, images: int) -> float:
        """By how much the request would make an accepted one late that is otherwise in time; 0 if none."""
        later = sorted((other for other in self._accepted if other.key > state.key), key=lambda other: other.key)
        started = self._clock() - self._running()[0]
        everything = _seconds(self._all_work()[0] + Counter({queue: images}))
        if started + everything <= min((other.deadline for other in later), default=math.inf):
            return 0.0
        without = self._work_ahead(state)[0].copy()
        with_it = without + Counter({queue: images})
        worst = 0.0
        for other in later:
            other_queue, pending = self._accepted[other]
            for work in (without, with_it):
                work[other_queue] += pending.waiting
            finish = started + _seconds(with_it)
            if finish > other.deadline >= started + _seconds(without):
                worst = max(worst, finish - other.deadline)
        return worst

    def _running(self) -> tuple[float, float]:
        """Seconds done and seconds left of the running batch; 0 if there is none."""
        for queue in self._scheduler.queues:
            # Read once: the engine thread sets it.
            if running := queue.running:
                started, seconds = running
                done = min(seconds, self._clock() - started)
                return done, seconds - done
        return 0.0, 0.0

    def _decode_seconds(self, images: int) -> float:
        return math.ceil(images / self._load.decode_threads) * self._load.decode_seconds


class Place:
    """The room that one request holds, from admission to answer. Leaving the context is the only way to free it."""

    __slots__ = ("_admission", "bytes", "images", "state")

    def __init__(self, admission: Admission, state: RequestState) -> None:
        self._admission, self.state = admission, state
        self.images = self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.release(self)

    def hold_bytes(self, count: int) -> None:
        """Account for more bytes of the request's body. Raises Overloaded if all bodies would be too large."""
        self._admission.hold_bytes(self, count)


def _seconds(work: Counter[Queue]) -> float:
    return sum(queue.cost.total(images) for queue, images in work.items() if images > 0)
