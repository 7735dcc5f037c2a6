"""The decode pool: the most urgent image first, and images that take long in a lane of their own.

Without the second lane a few large photos would occupy every decoder, and small images would wait behind them. In each
lane batch work gets its share of the turns.
"""

import asyncio
import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import structlog

from service.image_work import work_of, work_of_opened
from service.images import SMALL_BYTES, ImageRules, OpenedImage
from service.manifest import Preprocessing
from service.scheduling.cost import LARGE_WORK, Load
from service.scheduling.request import Key, RequestState
from service.scheduling.scheduler import Queue, Scheduler
from service.scheduling.turns import BATCH_SHARE, Turns

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]
_Box = list[tuple[Callable[[], Any], "asyncio.Future[Any]"]]
"""What to call, with its image, and who waits for it; empty once a thread has it, or the request is over."""
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
        """Work of decoding each of them in pixels, by their headers, for admission and for `decode`."""
        return [work_of(image, preprocessing, self._rules) for image in images]

    async def decode(
        self, image: bytes, preprocessing: Preprocessing, state: RequestState, queue: Queue, work: int
    ) -> tuple[Pixels, float]:
        """An encoded image of a request accepted by `queue` as uint8 (crop, crop, 3), and the seconds it took.

        `work`: as `work_of` says. Raises ImageError, or what `run` raises.
        """
        load = self._load

        def opened() -> OpenedImage:
            return self._rules.open(image, preprocessing)

        def small() -> Pixels | OpenedImage:
            found = opened()
            return found if work_of_opened(found, len(image)) > LARGE_WORK else found.render()

        try:
            needs = _LEAST * (work * load.seconds_per_pixel + queue.cost.least)
            seconds = 0.0
            if work <= LARGE_WORK:
                try:
                    with queue.backlog.in_decode_pool(state):
                        result, seconds = await self._small.run(state, small, needs=needs)
                finally:
                    self._scheduler.wake()
                if isinstance(result, np.ndarray):
                    load.decoded(seconds, work)
                    return result, seconds
                # Its header hid how large it is.
                pixels, more = await self._large.run(state, result.render)
                return pixels, seconds + more
            pixels, seconds = await self._large.run(state, lambda: opened().render(), needs=needs)
            load.decoded(seconds, work)
            return pixels, seconds
        except BaseException:
            # It will never reach the engine.
            queue.backlog.answered(state)
            raise
        finally:
            queue.backlog.decoded(state, work)

    async def run(self, state: RequestState, work: Callable[[], T]) -> T:
        """Call `work` in the pool. Raises ClientDisconnected or DeadlineExceeded instead of calling it in vain."""
        outcome, _ = await self._small.run(state, work)
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
        self._turns = Turns(batch_share)
        self._numbers = itertools.count()
        self._closing = False
        self._next_sweep = 0.0
        self._change = threading.Condition()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    def __len__(self) -> int:
        return len(self._waiting[0]) + len(self._waiting[1])

    async def run(self, state: RequestState, work: Callable[[], T], *, needs: float = 0.0) -> tuple[T, float]:
        """Call `work` in a thread: its result and its seconds.

        Raises ClientDisconnected or DeadlineExceeded if the request is over by then, or would be in `needs` seconds.
        """
        answer: asyncio.Future[tuple[T, float]] = asyncio.get_running_loop().create_future()
        box: _Box = [(work, answer)]
        with self._change:
            heapq.heappush(self._waiting[state.key.batch], (state.key, next(self._numbers), state, needs, box))
            self._change.notify()
        try:
            return await state.wait(answer)
        finally:
            # The job of a request that is over stays in the queue until a thread is free: without its image, which the
            # error in the answer refers to as well, by its traceback.
            box.clear()
            del work, answer

    def close(self) -> None:
        """Cancel waiting jobs; threads end with their current job. On the event loop."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        for *_, box in itertools.chain(*self._waiting):
            for _, answer in box:
                answer.cancel()

    def _work(self) -> None:
        """The main loop of a thread."""
        going_on = True
        while going_on:
            try:
                going_on = self._turn()
            except Exception:
                # One job fails, by its deadline; without the thread all would.
                log.exception("a decoder failed beside its work")

    def _turn(self) -> bool:
        """Wait for a job and do it. False if there will be no more."""
        with self._change:
            while not (len(self) or self._closing):
                self._change.wait()
            if self._closing:
                return False
            interactive, batch = self._waiting
            batch_first = self._turns.batch_first(interactive_waits=bool(interactive), batch_waits=bool(batch))
            _, _, state, needs, box = heapq.heappop(batch if batch_first else interactive)
            swept = self._sweep()
        _drop(swept)
        if (taken := _take(box)) is None:
            return True
        work, answer = taken
        if answer.done():
            return True
        try:
            started = self._clock()
            if state.over(started + needs):
                raise state.error(_STAGE)
            outcome: Any = work(), self._clock() - started
            failure: BaseException | None = None
        except BaseException as error:  # noqa: BLE001 (it is raised in the caller)
            outcome, failure = None, error
        _call_back(answer, outcome, failure)
        # The failure refers to this frame by its traceback: neither may keep the image alive.
        del taken, work, answer, outcome, failure
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


def _take(box: _Box) -> tuple[Callable[[], Any], "asyncio.Future[Any]"] | None:
    """What is in the box, if it is not empty: the event loop may empty it at any time."""
    try:
        return box.pop()
    except IndexError:
        return None


def _drop(jobs: list[_Job]) -> None:
    """Tell those who wait that their requests are over, and keep nothing of the jobs."""
    for _, _, state, _, box in jobs:
        if taken := _take(box):
            _call_back(taken[1], None, state.error(_STAGE))


def _call_back(answer: "asyncio.Future[Any]", outcome: Any, failure: BaseException | None) -> None:
    # A closed loop has nobody left who waits.
    with contextlib.suppress(RuntimeError):
        answer.get_loop().call_soon_threadsafe(_settle, answer, outcome, failure)


def _settle(answer: "asyncio.Future[Any]", outcome: Any, failure: BaseException | None) -> None:
    if answer.done():
        return
    if failure is not None:
        answer.set_exception(failure)
    else:
        answer.set_result(outcome)
