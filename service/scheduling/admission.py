"""Admission: a request is taken only if there is room for it and it can finish in time; else it is told at once.

Two bounds, on requests' images and on their bytes, keep memory flat. Against the deadline stands the predicted finish:
the work ahead of a request in the order of its `Key`, by the cost model. A request is also refused where it would make
one that was accepted before it late.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import Overloaded
from service.scheduling.cost import Load
from service.scheduling.request import Key, RequestState
from service.scheduling.scheduler import Queue, Scheduler


class Admission:
    """All requests in work, and what they will cost."""

    def __init__(
        self, scheduler: Scheduler, load: Load, *, max_images_per_request: int, max_bytes: int, margin: float = 1.0
    ) -> None:
        """`margin`: the part of its deadline within which a request must be predicted to finish."""
        self._scheduler, self._load = scheduler, load
        self._max_images, self._max_bytes, self._margin = max_images_per_request, max_bytes, margin
        self._accepted: dict[RequestState, Queue] = {}
        self._last: Key | None = None
        """No accepted request comes after this one; it may have been answered in the meantime."""
        self._version = 0
        self._ahead: tuple[RequestState, int, Counter[Queue], int] | None = None
        """The last request asked about, and the work ahead of it: several models are predicted for one request."""
        self.images = 0
        """Images accepted and not yet answered."""
        self.bytes = 0
        """Bodies accepted and not yet answered."""

    @contextmanager
    def place(self, ticket: RequestState) -> Iterator[None]:
        """Account for a request until it is answered. Raises Overloaded at once if there is no room for one image.

        Its images count once they are accepted: who sends slowly takes up bytes, but nobody's place.
        """
        self._need_room(1)
        try:
            yield
        finally:
            self.images -= ticket.images
            self.bytes -= ticket.bytes
            self._accepted.pop(ticket, None)
            self._version += 1
            ticket.leave()

    def hold_bytes(self, ticket: RequestState, count: int) -> None:
        """Account for `count` more bytes of a body. Raises Overloaded if all bodies together would be too large."""
        if self.bytes + count > self._max_bytes:
            raise Overloaded(
                f"the images in work hold {self.bytes:,} bytes and {self._max_bytes:,} are allowed: "
                "nothing was done for this request, send it again later",
                reason="bytes",
                retry_after_s=self.graceful_timeout_seconds(),
            )
        self.bytes += count
        ticket.bytes += count

    def accept(self, ticket: RequestState, queue: Queue, images: int, *, encoded: bool) -> None:
        """Take on the work of a request. Raises Overloaded if it cannot finish in time or there is no room."""
        self._need_room(images)
        predicted = self.predict(queue, ticket, images, encoded=encoded)
        self.require_in_time(ticket, predicted)
        if not self._is_last(ticket) and (late := self._would_be_late(ticket, queue, images)):
            raise Overloaded(
                "this request would make one that was accepted before it miss its deadline: "
                "nothing was done for it, send it again later or with a later deadline",
                reason="deadline",
                retry_after_s=late,
            )
        self.images += images
        self._version += 1
        ticket.accepted(images, queue.backlog, encoded=encoded)
        self._accepted[ticket] = queue
        self._last = max(self._last, ticket.key) if self._last else ticket.key

    def require_in_time(self, ticket: RequestState, predicted: float) -> None:
        """Raise Overloaded if `predicted` seconds from now are too late for the request."""
        allowed = self.allowed_seconds(ticket)
        if predicted > allowed:
            raise Overloaded(
                f"the deadline leaves {max(0.0, allowed) * 1000:.0f} ms and the work ahead takes about "
                f"{predicted * 1000:.0f} ms: nothing was done for this request, send it again later or with a later "
                "deadline",
                reason="deadline",
                retry_after_s=predicted - allowed,
            )

    def allowed_seconds(self, ticket: RequestState) -> float:
        """From now, within which the request must be predicted to finish."""
        return self._margin * (ticket.deadline - ticket.since) - (time.perf_counter() - ticket.since)

    def predict(self, queue: Queue, ticket: RequestState, images: int = 1, *, encoded: bool = True) -> float:
        """Seconds from now in which a request of `images` for `queue` would be answered."""
        ahead, undecoded = self._work_ahead(ticket)
        work = ahead + Counter({queue: images})
        # What runs now is done first, also where the request overtakes all else.
        own = self._left_in_flight() + queue.cost.total(images)
        engine = max(own, _seconds(work) + self._in_flight())
        if not encoded:
            return engine
        # Decoding and inference overlap; what cannot overlap is the last image's own decoding and batch.
        decode = self._decode_seconds(undecoded + images)
        last = queue.cost.total(min(images, queue.cost.limit))
        return max(decode + last, engine + self._load.decode_seconds)

    def graceful_timeout_seconds(self) -> float:
        """How long the work accepted so far will take."""
        work, undecoded = self._all_work()
        return max(0.0, _seconds(work) + self._in_flight(), self._decode_seconds(undecoded))

    def _is_last(self, ticket: RequestState) -> bool:
        """Whether all accepted work comes before the request's, as it does where all have the same deadline."""
        if self._last is None or ticket.key > self._last:
            return True
        self._last = max((other.key for other in self._accepted), default=None)
        return self._last is None or ticket.key > self._last

    def _work_ahead(self, ticket: RequestState) -> tuple[Counter[Queue], int]:
        if self._is_last(ticket):
            return self._all_work()
        if self._ahead is None or self._ahead[:2] != (ticket, self._version):
            before = [other for other in self._accepted if other.key < ticket.key]
            work = Counter[Queue]()
            for other in before:
                work[self._accepted[other]] += other.waiting
            self._ahead = ticket, self._version, work, sum(other.undecoded for other in before)
        return self._ahead[2], self._ahead[3]

    def _all_work(self) -> tuple[Counter[Queue], int]:
        """Images by queue that the engine has to answer, and those to be decoded."""
        work = Counter[Queue]()
        undecoded = 0
        for queue in self._scheduler.queues:
            if queue.backlog.waiting:
                work[queue] = queue.backlog.waiting
            undecoded += queue.backlog.undecoded
        return work, undecoded

    def _need_room(self, images: int) -> None:
        if self.images + images > self._max_images:
            raise Overloaded(
                f"{self.images} images are in work and {self._max_images} are allowed: "
                "nothing was done for this request, send it again later",
                reason="images",
                retry_after_s=self.graceful_timeout_seconds(),
            )

    def _would_be_late(self, ticket: RequestState, queue: Queue, images: int) -> float:
        """Seconds by which the request would make an accepted one late that would else be in time; 0 if none."""
        later = [other for other in self._accepted if other.key > ticket.key]
        now, in_flight = time.perf_counter(), self._in_flight()
        everything = _seconds(self._all_work()[0] + Counter({queue: images}))
        if now + in_flight + everything <= min((other.deadline for other in later), default=math.inf):
            return 0.0
        later.sort(key=lambda other: other.key)
        work = self._work_ahead(ticket)[0].copy()
        with_it = work + Counter({queue: images})
        worst = 0.0
        for other in later:
            for counted in (work, with_it):
                counted[self._accepted[other]] += other.waiting
            finish = now + in_flight + _seconds(with_it)
            if finish > other.deadline >= now + in_flight + _seconds(work):
                worst = max(worst, finish - other.deadline)
        return worst

    def _in_flight(self) -> float:
        """What is done already of the batch that runs now: as much less than nothing."""
        return -sum(done for done, _ in self._running())

    def _left_in_flight(self) -> float:
        """What is still to do of the batch that runs now."""
        return sum(seconds - done for done, seconds in self._running())

    def _running(self) -> list[tuple[float, float]]:
        """Seconds done, and predicted in all, of the batch that runs now, if there is one."""
        now = time.perf_counter()
        running = [queue.running for queue in self._scheduler.queues if queue.running]
        return [(min(seconds, now - started), seconds) for started, seconds in running]

    def _decode_seconds(self, images: int) -> float:
        return math.ceil(images / self._load.decode_threads) * self._load.decode_seconds


def _seconds(work: Counter[Queue]) -> float:
    return sum(queue.cost.total(images) for queue, images in work.items() if images > 0)
