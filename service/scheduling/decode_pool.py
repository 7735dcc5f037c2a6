"""The decode pool: the most urgent image first, and images that take long in a lane of their own.

Without the second lane, a few large photos would occupy every decoder, and small images would wait behind them. In each
lane, batch work gets its share of the turns.
"""

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import structlog

from service.errors import TooManyPixels
from service.image_work import work_of, work_of_opened
from service.images import SMALL_BYTES, ImageRules, OpenedImage
from service.manifest import Preprocessing
from service.scheduling.cost import LARGE_WORK, Load
from service.scheduling.loop_calls import call_on_loop
from service.scheduling.outputs import Pixels
from service.scheduling.queue import Entry, Queue
from service.scheduling.request import Key, RequestState
from service.scheduling.scheduler import Scheduler
from service.scheduling.turns import BATCH_SHARE, Turns

T = TypeVar("T")
_Done = Callable[[Any, float, BaseException | None], None]
"""Gets what a job returned, how long it took and how it failed, on the job's thread."""


class _Call(NamedTuple):
    """Work for a thread; it holds an image."""

    work: Callable[[], Any]
    done: _Done
    answer: "asyncio.Future[Any]"
    """Once it is done, the work is no longer needed."""


_Box = list[_Call]
"""Empty once a thread has the call, or the request is over."""
_Job = tuple[Key, int, RequestState, float, _Box]

log = structlog.get_logger()

_SWEEP_SECONDS = 0.05
_STAGE = "before the image was decoded"

_LEAST = 0.5
"""An image is not decoded if even this fraction of its predicted work would end after its deadline."""


class DecodePool:
    """Decodes images, and keeps the scheduler and the cost model informed about it."""

    def __init__(
        self, scheduler: Scheduler, load: Load, *, rules: ImageRules, batch_share: float = BATCH_SHARE
    ) -> None:
        """With as many threads as `load` says; `rules` say which images are decoded."""
        self._scheduler, self._load, self._rules = scheduler, load, rules
        self._small = Lane(load.decode_threads, "decode", load.clock, batch_share=batch_share)
        self._large = Lane(load.large_threads, "decode-large", load.clock, batch_share=batch_share)

    @property
    def held_bytes(self) -> int:
        """Upper bound of the memory that decoding takes now."""
        load, budget = self._load, self._rules.memory
        undecoded = sum(queue.backlog.undecoded for queue in self._scheduler.queues)
        small = min(undecoded, load.decode_threads + load.large_threads) * SMALL_BYTES
        return small + (budget.taken_bytes if budget else 0)

    def work_of(self, images: Sequence[bytes], preprocessing: Preprocessing) -> list[int]:
        """The decoding work of each in pixels, by its header, for admission and for `decoding`."""
        return [work_of(image, preprocessing, self._rules) for image in images]

    @contextmanager
    def decoding(
        self, image: bytes, preprocessing: Preprocessing, queue: Queue, entry: Entry, work: int
    ) -> Iterator[None]:
        """Decode an encoded image of a request accepted by `queue`, and give its pixels to the engine.

        `work`: as `work_of` says. The outcome of `entry` is the image's error if it has one (ImageError, or the
        request's). On exit nothing more is done for the image. On the event loop.
        """
        decoding = _Decoding(self._scheduler, self._load, image, preprocessing, self._rules, queue, entry, work)
        try:
            decoding.begin(self._small, self._large)
            yield
        finally:
            decoding.end()
            self._scheduler.forget(queue, entry)

    async def run(self, state: RequestState, work: Callable[[], T]) -> T:
        """Call `work` in the pool. Raises ClientDisconnected or DeadlineExceeded instead of calling it in vain."""
        outcome, _ = await self._small.run(state, work)
        return outcome

    async def pixels(
        self, image: bytes, preprocessing: Preprocessing, state: RequestState, work: int
    ) -> tuple[Pixels, float]:
        """Decode an encoded image for a caller that offers its pixels itself; returns them and the seconds it took.

        `work`: as `work_of` says. Raises ImageError, or the request's error.
        """
        opening, needs = partial(self._rules.open, image, preprocessing), _LEAST * work * self._load.seconds_per_pixel
        if work > LARGE_WORK:
            pixels, seconds = await self._large.run(state, lambda: opening().render(), needs=needs)
        else:
            outcome, seconds = await self._small.run(
                state, partial(_rendered_if_small, opening, len(image)), needs=needs
            )
            if isinstance(outcome, OpenedImage):
                pixels, more = await self._large.run(state, outcome.render)
                return pixels, seconds + more
            pixels = outcome
        self._load.decoded(seconds, work)
        return pixels, seconds

    @property
    def seconds_per_pixel(self) -> float:
        """Predicted duration of decoding, for each pixel of work."""
        return self._load.seconds_per_pixel

    def render_here(self, image: bytes, preprocessing: Preprocessing) -> Pixels:
        """Decode a small image in the calling thread, outside the pool. Raises ImageError, also for a large one."""
        outcome = _rendered_if_small(partial(self._rules.open, image, preprocessing), len(image))
        if isinstance(outcome, OpenedImage):
            raise TooManyPixels("the image takes more work than its header said")
        return outcome

    def close(self) -> None:
        """Cancel waiting jobs; threads end with their current job. On the event loop."""
        self._small.close()
        self._large.close()


class Lane:
    """Some threads, and the jobs that wait for them in the order of their requests' keys."""

    def __init__(
        self,
        threads: int,
        name: str,
        clock: Callable[[], float] = time.perf_counter,
        *,
        batch_share: float = BATCH_SHARE,
    ) -> None:
        self._clock = clock
        self._waiting: tuple[list[_Job], list[_Job]] = [], []
        """Interactive and batch jobs."""
        self._idle = 0
        """Threads that wait for a job."""
        self._turns = Turns(batch_share)
        self._numbers = itertools.count()
        self._closing = False
        self._next_sweep = 0.0
        self._change = threading.Condition()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    def __len__(self) -> int:
        return len(self._waiting[0]) + len(self._waiting[1])

    def spares_a_thread(self) -> bool:
        """Whether one of its threads may do other work: no job waits, and another thread is there for the next one."""
        with self._change:
            return self._idle > 0 and not len(self)

    def put(self, state: RequestState, call: _Call, *, needs: float = 0.0) -> _Box:
        """Have `call.work` called in a thread, and then `call.done` in the same one.

        The error is ClientDisconnected or DeadlineExceeded, and the work is not done, if the request is over by then,
        or would be in `needs` seconds. Emptying the returned box takes the job back, unless it has begun.
        """
        box = [call]
        with self._change:
            heapq.heappush(self._waiting[state.key.batch], (state.key, next(self._numbers), state, needs, box))
            self._change.notify()
        return box

    async def run(self, state: RequestState, work: Callable[[], T], *, needs: float = 0.0) -> tuple[T, float]:
        """Call `work` in a thread; returns its result and the seconds it took. Raises what `put` says."""
        answer: asyncio.Future[tuple[T, float]] = asyncio.get_running_loop().create_future()
        box = self.put(state, _Call(work, partial(_call_back, answer), answer), needs=needs)
        try:
            return await state.wait(answer)
        finally:
            # The job of a request that is over stays in the queue until a thread is free, but without its image. The
            # error in the answer refers to the image as well, through its traceback.
            box.clear()
            del work, answer

    def close(self) -> None:
        """Cancel waiting jobs; threads end with their current job. On the event loop."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        for *_, box in itertools.chain(*self._waiting):
            for call in box:
                call.done(None, 0.0, asyncio.CancelledError())

    def _work(self) -> None:
        """The main loop of a thread."""
        going_on = True
        while going_on:
            try:
                going_on = self._turn()
            except Exception:
                # One job fails, at its deadline; without the thread, all would.
                log.exception("a decoder failed beside its work")

    def _turn(self) -> bool:
        """Wait for a job and do it; returns False if there will be no more."""
        with self._change:
            while not (len(self) or self._closing):
                self._idle += 1
                self._change.wait()
                self._idle -= 1
            if self._closing:
                return False
            interactive, batch = self._waiting
            batch_first = self._turns.batch_first(interactive_waits=bool(interactive), batch_waits=bool(batch))
            _, _, state, needs, box = heapq.heappop(batch if batch_first else interactive)
            swept = self._sweep()
        _drop(swept)
        if (taken := _take(box)) is None:
            return True
        work, done, answer = taken
        if answer.done():
            return True
        outcome: Any = None
        failure: BaseException | None = None
        started = self._clock()
        try:
            if state.over(started + needs):
                raise state.error(_STAGE)
            outcome = work()
        except BaseException as error:  # noqa: BLE001 (it is raised in the caller)
            failure = error
        done(outcome, self._clock() - started, failure)
        # The failure refers to this frame through its traceback: neither may keep the image alive.
        del taken, work, done, answer, outcome, failure
        return True

    def _sweep(self) -> list[_Job]:
        """Now and then, take out the jobs of requests that are over: those at the end may never get their turn."""
        now = self._clock()
        if now < self._next_sweep:
            return []
        self._next_sweep = now + _SWEEP_SECONDS
        over: list[_Job] = []
        for waiting in self._waiting:
            if gone := [job for job in waiting if job[2].over(now)]:
                numbers = {job[1] for job in gone}
                waiting[:] = [job for job in waiting if job[1] not in numbers]
                heapq.heapify(waiting)
                over += gone
        return over


class _Decoding:
    """An image in the pool. Begun and ended on the event loop, where its work is counted."""

    def __init__(
        self,
        scheduler: Scheduler,
        load: Load,
        image: bytes,
        preprocessing: Preprocessing,
        rules: ImageRules,
        queue: Queue,
        entry: Entry,
        work: int,
    ) -> None:
        self._scheduler, self._load, self._queue, self._entry, self._work = scheduler, load, queue, entry, work
        self._open = partial(rules.open, image, preprocessing)
        self._bytes = len(image)
        self._loop = asyncio.get_running_loop()
        self._box: _Box = []
        self._ended, self._as_predicted = False, True
        self._is_small = work <= LARGE_WORK

    def begin(self, small: Lane, large: Lane) -> None:
        """Put the image into the lane for its work; from there it may go on to the one for large images."""
        self._small, self._large = small, large
        state, queue = self._entry.state, self._queue
        needs = _LEAST * (self._work * self._load.seconds_per_pixel + queue.cost.least)
        self._scheduler.expect(queue, self._entry, soon=self._is_small)
        if self._is_small:
            render = partial(_rendered_if_small, self._open, self._bytes)
            self._box = small.put(state, self._call(render), needs=needs)
        else:
            self._box = large.put(state, self._call(lambda: self._open().render()), needs=needs)

    def end(self) -> None:
        """Count its work as done."""
        if not self._ended:
            self._ended = True
            # The job of a request that is over stays in its lane until a thread is free, but without its image.
            self._box.clear()
            self._queue.backlog.decoded(self._entry.state, self._work)

    def _call(self, work: Callable[[], Any]) -> _Call:
        return _Call(work, self._done, self._entry.answer)

    # In a decoder's thread.

    def _done(self, outcome: Any, seconds: float, failure: BaseException | None) -> None:
        self._entry.decode_seconds += seconds
        if failure is not None:
            call_on_loop(self._loop, self._entry.settle, failure)
        elif isinstance(outcome, OpenedImage):
            call_on_loop(self._loop, self._go_on, outcome)
        else:
            call_on_loop(self._loop, self._decoded, seconds)
            # After decoding a large image, two thread switches are nothing, and the next one may need this thread.
            here = self._is_small and self._small.spares_a_thread()
            self._scheduler.offer(self._queue, self._entry, outcome, here=here)

    # On the event loop.

    def _decoded(self, seconds: float) -> None:
        if not self._ended:
            if self._as_predicted:
                self._load.decoded(seconds, self._work)
            self.end()

    def _go_on(self, opened: OpenedImage) -> None:
        """The image is larger than its header said: move it to the lane for large images."""
        if not self._ended:
            self._is_small = self._as_predicted = False
            self._scheduler.postpone(self._queue, self._entry)
            self._box = self._large.put(self._entry.state, self._call(opened.render))


def _rendered_if_small(opening: Callable[[], OpenedImage], count: int) -> Pixels | OpenedImage:
    """The pixels of an image of `count` bytes, or what was opened if its header hid how large it is."""
    opened = opening()
    return opened if work_of_opened(opened, count) > LARGE_WORK else opened.render()


def _take(box: _Box) -> _Call | None:
    """What is in the box, if it is not empty: the event loop may empty it at any time."""
    try:
        return box.pop()
    except IndexError:
        return None


def _drop(jobs: list[_Job]) -> None:
    """Tell those who wait that their requests are over, and keep nothing of the jobs."""
    for _, _, state, _, box in jobs:
        if taken := _take(box):
            taken.done(None, 0.0, state.error(_STAGE))


def _call_back(answer: "asyncio.Future[Any]", outcome: Any, seconds: float, failure: BaseException | None) -> None:
    call_on_loop(answer.get_loop(), _settle, answer, (outcome, seconds), failure)


def _settle(answer: "asyncio.Future[Any]", outcome: Any, failure: BaseException | None) -> None:
    if answer.done():
        return
    if isinstance(failure, asyncio.CancelledError):
        answer.cancel()
    elif failure is not None:
        answer.set_exception(failure)
    else:
        answer.set_result(outcome)
