"""Admission: a request is taken only if there is room for it and it can finish in time; otherwise it gets 429 at once.

Two bounds, on the images and on the bytes of all requests, keep memory flat (`service.scheduling.room`). The finish
of a request is predicted from the cost model, the work ahead of it in the order of its `Key` and the lag of the event
loop, and compared with its deadline twice: when the request's headers arrive, before its body is read, and by the
headers of its images, before anything is decoded. A request is also rejected if it would make one of its class that was
accepted earlier miss its deadline.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from service.errors import Overloaded
from service.scheduling.backlog import Work, work_of
from service.scheduling.cost import LARGE_WORK, Load
from service.scheduling.lanes import Running
from service.scheduling.loop_lag import LoopLag
from service.scheduling.request import Key, RequestState
from service.scheduling.room import Room
from service.scheduling.scheduler import Queue, Scheduler

_PRESSED_SECONDS = 1.0
"""For this long after a refusal, each request is compared with the work ahead as soon as its headers arrive."""

_REFUSING_SECONDS = 10.0
"""For this long after a refusal, families keep time free for the next requests."""

_COMING_SECONDS = 0.1
"""How long a request counts whose headers are here, but not its images: a slow sender does not hold up others."""


@dataclass(slots=True)
class _Ahead:
    """Work of one priority class that comes before a request."""

    engine: dict[Queue, int] = field(default_factory=dict)
    """Images that the engine has yet to answer, excluding those that the large lane has yet to decode."""
    undecoded: dict[Queue, int] = field(default_factory=dict)
    """The latter, for the same queues: small images do not wait for them."""
    small: int = 0
    large: int = 0
    """Decoding work in each lane, in pixels."""

    def add(self, queue: Queue, work: Work) -> None:
        self.engine[queue] = self.engine.get(queue, 0) + work.waiting - work.large_images
        self.undecoded[queue] = self.undecoded.get(queue, 0) + work.large_images
        self.small += work.small
        self.large += work.large

    def seconds(self, queue: Queue | None = None, images: int = 0, *, large: bool = True) -> float:
        """Engine seconds, with `images` more of `queue`; `large`: including what the large lane has yet to decode."""
        seconds = 0.0
        for other, count in self.engine.items():
            waiting = count + self.undecoded[other] if large else count
            if other is queue:
                waiting, queue = waiting + images, None
            if waiting > 0:
                seconds += other.cost.total(waiting)
        return seconds if queue is None else seconds + queue.cost.total(images)

    def tail(self) -> float:
        """By how much the last of the batches takes longer than its share of `seconds`."""
        return max((queue.cost.tail(count) for queue, count in self.engine.items() if count > 0), default=0.0)


class Admission:
    """All requests being answered, and what they will cost."""

    def __init__(
        self, scheduler: Scheduler, load: Load, room: Room, *, margin: float, batch_share: float, lag: LoopLag
    ) -> None:
        """`margin`: the fraction of its deadline within which a request must be predicted to finish. `batch_share`: as
        in the scheduler and of the decode pool."""
        self._scheduler, self._load, self._clock, self._lag = scheduler, load, load.clock, lag
        self._margin = margin
        self._overtaking = batch_share / (1 - batch_share)
        """Batch images that are done before an interactive one although they come after it, per image ahead of it."""
        self.room = room
        self._accepted: dict[RequestState, tuple[Queue, Work]] = {}
        self._last: list[Key | None] = [None, None]
        """By class, a key that no accepted request comes after; its own may have been answered in the meantime."""
        self._pressed_at = -math.inf
        self._version = 0
        """Changes with the accepted work."""
        self._ahead: tuple[Key, int, _Ahead] | None = None
        """The last request asked about, and the work ahead of it: one request is predicted for several models."""

    @property
    def images(self) -> int:
        """Images accepted and not yet answered."""
        return self.room.images

    @property
    def bytes(self) -> int:
        """Bytes of bodies accepted and not yet answered."""
        return self.room.bytes

    @property
    def pressed(self) -> bool:
        """Whether a request was too late a moment ago: others are likely to be."""
        return self._clock() < self._pressed_at + _PRESSED_SECONDS

    @property
    def refusing(self) -> bool:
        """Whether a request was too late in the last seconds, so that families keep time free for the next ones."""
        return self._clock() < self._pressed_at + _REFUSING_SECONDS

    def press(self) -> None:
        """Record that a request is too late."""
        self._pressed_at = self._clock()

    def late_by_head(self, queue: Queue, state: RequestState) -> float:
        """Seconds by which a request whose headers have just arrived would be late; if it is not, it counts as coming.

        Other requests arrive between its headers and its images, and must not be promised the same place. Only those of
        its own model and priority count.
        """
        now, coming = self._clock(), queue.backlog.coming[state.key.batch]
        while coming and now - coming[0] > _COMING_SECONDS:
            coming.popleft()
        late = self.predict(queue, state, 1 + len(coming)) - self.allowed_seconds(state)
        if late <= 0:
            coming.append(now)
        return late

    def admit(self, state: RequestState, queue: Queue, *, decoding: Sequence[int] = ()) -> "Place":
        """Room for a request whose body is not yet read: enter it as a context, and leave it when all is answered.

        `queue` is that of the fastest model that may answer; `decoding` is the least decoding work that there will be,
        as far as the headers tell. Raises Overloaded if it could not finish in time, or if there is no room for one
        image. Images take up room only once they are accepted: a slow sender takes up only room for bytes.
        """
        self.require_in_time(state, self.predict(queue, state, decoding=decoding))
        self.room.require(1, batch=state.key.batch, drain_seconds=self.drain_seconds)
        return Place(self, state)

    def accept(self, place: "Place", queue: Queue, images: int, *, decoding: Sequence[int] = ()) -> None:
        """Accept a request's images. Raises Overloaded if they cannot finish in time or there is no room for them.

        `decoding`: the decoding work of each, empty if they are pixels.
        """
        state = place.state
        if coming := queue.backlog.coming[state.key.batch]:
            coming.popleft()
        self.room.require(images, batch=state.key.batch, drain_seconds=self.drain_seconds)
        place.predicted_seconds = self.predict(queue, state, images, decoding=decoding)
        self.require_in_time(state, place.predicted_seconds)
        if not self._is_last(state) and (late := self._seconds_late(state, queue, images)):
            raise Overloaded(
                "this request would make an earlier one miss its deadline: "
                "nothing was done for it, send it again later or with a later deadline",
                reason="deadline",
                retry_after_s=late,
            )
        self._version += 1
        self._load.arrivals.add(images * queue.cost.per_image())
        place.hold_images(images)
        self._accepted[state] = queue, queue.backlog.accept(state, work_of(images, decoding))
        last = self._last[state.key.batch]
        self._last[state.key.batch] = max(last, state.key) if last else state.key

    def release(self, place: "Place") -> None:
        """Free all that a request holds."""
        self._version += 1
        if accepted := self._accepted.pop(place.state, None):
            accepted[0].backlog.release(place.state)

    def require_in_time(self, state: RequestState, predicted: float) -> None:
        """Raise Overloaded if `predicted` seconds from now are too late for the request."""
        allowed = self.allowed_seconds(state)
        if predicted > allowed:
            self.press()
            raise Overloaded(
                f"the deadline leaves {max(0.0, allowed) * 1000:.0f} ms and the work ahead takes about "
                f"{predicted * 1000:.0f} ms: nothing was done for this request, send it again later or with a later "
                "deadline",
                reason="deadline",
                retry_after_s=self.retry_seconds(state, predicted - allowed),
            )

    def retry_seconds(self, state: RequestState, late: float) -> float:
        """Seconds after which a request like one that would be `late` now could finish in time.

        A new request has no age, and the event loop will not be late for long.
        """
        return max(self._lag.seconds, late - (self._clock() - state.arrived_at) - self._lag.delay_seconds)

    def allowed_seconds(self, state: RequestState) -> float:
        """Seconds from now within which the request must be predicted to finish."""
        return self._margin * (state.deadline - state.arrived_at) - (self._clock() - state.arrived_at)

    def predict(self, queue: Queue, state: RequestState, images: int = 1, *, decoding: Sequence[int] = ()) -> float:
        """Predicted seconds from now until a request of `images` for `queue` is answered."""
        own, other = self._work_ahead(state), self._all_work(batch=not state.key.batch)
        # Seconds of the other class's work that are done for each second of this class's work.
        ratio = 1 / self._overtaking if state.key.batch else self._overtaking
        runs = self._scheduler.lanes.runs
        large = any(work > LARGE_WORK for work in decoding)
        work = own.seconds(queue, images, large=large)
        if other.engine:
            work += min(other.seconds(large=large), ratio * work)
        cost, idle = queue.cost, not (any(run.cores for run in runs) or own.engine or other.engine)
        # What runs is finished first, even if the request overtakes everything else.
        engine = self._wait_seconds(runs, queue) + cost.finish(images, idle=idle)
        if not idle:
            tail = max(cost.tail(images), own.tail(), other.tail())
            engine = max(engine, work - self._done_seconds(runs) + tail)
        if decoding:
            # Decoding and inference overlap, except for the last image's own decoding and batch.
            decoded = self._decode_seconds(own, other, decoding, ratio)
            engine = max(engine, decoded + cost.finish(min(images, cost.limit), idle=idle))
        return engine + self._lag.delay_seconds

    def idle_seconds(self, queue: Queue, images: int, *, decoding: Sequence[int] = ()) -> float:
        """What `predict` would say if there were no other requests."""
        return self._decode_seconds(_NOTHING, _NOTHING, decoding, 0.0) + queue.cost.finish(images, idle=True)

    def drain_seconds(self) -> float:
        """Predicted seconds until all accepted work is done."""
        work = _Ahead()
        for batch in (False, True):
            for queue in self._scheduler.queues:
                work.add(queue, queue.backlog.of_class[batch])
        decode = self._load.seconds_per_pixel * max(
            work.small / self._load.decode_threads, work.large / self._load.large_threads
        )
        runs, now = self._scheduler.lanes.runs, self._clock()
        engine = work.seconds() + work.tail() - self._done_seconds(runs)
        return max(0.0, engine, decode, *(_end(run) - now for run in runs)) + self._lag.delay_seconds

    def _is_last(self, state: RequestState) -> bool:
        """Whether all accepted work of its class comes before the request's, as when all have the same deadline."""
        batch = state.key.batch
        last = self._last[batch]
        if last is None or state.key > last:
            return True
        self._last[batch] = last = max(
            (other.key for other in self._accepted if other.key.batch == batch), default=None
        )
        return last is None or state.key > last

    def _work_ahead(self, state: RequestState) -> _Ahead:
        """The work of the request's class that is done before its images."""
        if self._is_last(state):
            return self._all_work(batch=state.key.batch)
        if self._ahead is None or self._ahead[:2] != (state.key, self._version):
            ahead = _Ahead()
            for other, (queue, left) in self._accepted.items():
                if other.key.batch == state.key.batch and other.key < state.key:
                    ahead.add(queue, left)
            self._ahead = state.key, self._version, ahead
        return self._ahead[2]

    def _all_work(self, *, batch: bool) -> _Ahead:
        ahead = _Ahead()
        for queue in self._scheduler.queues:
            if (left := queue.backlog.of_class[batch]).waiting:
                ahead.add(queue, left)
        return ahead

    def _seconds_late(self, state: RequestState, queue: Queue, images: int) -> float:
        """By how much an accepted request of the class that is now in time would be late because of this one, or 0."""
        batch = state.key.batch
        later = [other for other in self._accepted if other.key.batch == batch and other.key > state.key]
        later.sort(key=lambda other: other.key)
        started = self._clock() - self._done_seconds(self._scheduler.lanes.runs)
        all_work = self._all_work(batch=batch)
        tail = max(queue.cost.tail(images), all_work.tail())
        everything = started + all_work.seconds(queue, images) + tail
        if everything <= min((other.deadline for other in later), default=math.inf):
            return 0.0
        ahead = self._work_ahead(state)
        ahead = _Ahead(dict(ahead.engine), dict(ahead.undecoded))
        worst = 0.0
        for other in later:
            ahead.add(*self._accepted[other])
            finish = started + ahead.seconds(queue, images) + tail
            if finish > other.deadline >= started + ahead.seconds() + ahead.tail():
                worst = max(worst, finish - other.deadline)
        return worst

    def _wait_seconds(self, runs: Sequence[Running], queue: Queue) -> float:
        """Seconds until there are cores for another batch of the queue, if nothing else takes them."""
        lanes = self._scheduler.lanes
        needed = queue.cost.layouts[0].threads - (lanes.cores - sum(run.cores for run in runs))
        if needed <= 0:
            return 0.0
        for run in sorted(runs, key=_end):
            needed -= run.cores
            if needed <= 0:
                return max(0.0, _end(run) - self._clock())
        return 0.0

    def _done_seconds(self, runs: Sequence[Running]) -> float:
        """Device seconds of what is already done of the running batches."""
        now = self._clock()
        return sum(run.device_seconds * min(1.0, (now - run.started) / run.predicted) for run in runs if run.predicted)

    def _decode_seconds(self, own: _Ahead, other: _Ahead, decoding: Sequence[int], ratio: float) -> float:
        """Seconds until the images are decoded, each in its lane; `ratio` as in `predict`."""
        large = sum(work for work in decoding if work > LARGE_WORK)
        small, load = sum(decoding) - large, self._load
        work = 0.0
        if small:
            ahead = own.small + small
            work = (ahead + min(other.small, ratio * ahead)) / load.decode_threads
        if large:
            ahead = own.large + large
            work = max(work, (ahead + min(other.large, ratio * ahead)) / load.large_threads)
        # An image is decoded by one thread.
        return load.seconds_per_pixel * max(work, max(decoding, default=0))


class Place:
    """The room that one request holds, from admission to answer. Leaving the context is the only way to free it."""

    __slots__ = ("_admission", "bytes", "images", "predicted_seconds", "state")

    def __init__(self, admission: Admission, state: RequestState) -> None:
        self._admission, self.state = admission, state
        self.images = self.bytes = 0
        self.predicted_seconds = 0.0
        """Predicted finish when its images were accepted, in seconds from then."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        room = self._admission.room
        room.free_images(self.images, batch=self.state.key.batch)
        room.free_bytes(self.bytes)
        self._admission.release(self)

    def hold_images(self, count: int) -> None:
        """Account for the images of the request, for which there must be room."""
        self._admission.room.hold_images(count, batch=self.state.key.batch)
        self.images += count

    def give_up_images(self) -> None:
        """Free what was accepted: other work takes its place."""
        self._admission.room.free_images(self.images, batch=self.state.key.batch)
        self._admission.release(self)
        self.images = 0

    def hold_bytes(self, count: int) -> None:
        """Account for more bytes of the request's body. Raises Overloaded if all bodies would be too large."""
        self._admission.room.hold_bytes(count, before=self.bytes, drain_seconds=self._admission.drain_seconds)
        self.bytes += count

    def expect_bytes(self, count: int) -> None:
        """Raise Overloaded if a body of `count` bytes could not be held now."""
        self._admission.room.require_bytes(count, before=self.bytes, drain_seconds=self._admission.drain_seconds)


_NOTHING = _Ahead()


def _end(run: Running) -> float:
    """Predicted end of what a lane is doing."""
    return run.started + (run.predicted or 0.0)
