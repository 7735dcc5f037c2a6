"""The decode pool: the most urgent image first, and images that take long in a lane of their own.

Without the second lane a few large photos would occupy every decoder, and small images would wait behind them.
"""

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from service.images import LARGE_PIXELS, ImageRules, OpenedImage
from service.manifest import Preprocessing
from service.scheduling.cost import Load
from service.scheduling.request import Key, RequestState
from service.scheduling.scheduler import Queue, Scheduler

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]
_Job = tuple[Key, int, RequestState, Callable[[], Any], "asyncio.Future[Any]"]

_SWEEP_SECONDS = 0.05
_STAGE = "before the image was decoded"


class DecodePool:
    """Decodes images, and keeps the scheduler and the cost model informed about it."""

    def __init__(self, scheduler: Scheduler, load: Load, *, rules: ImageRules) -> None:
        """With as many threads as `load` says; `rules` say which images are decoded."""
        self._scheduler, self._load, self._rules = scheduler, load, rules
        self._small = Lane(load.decode_threads, "decode", load.clock)
        self._large = Lane(max(1, load.decode_threads // 2), "decode-large", load.clock)

    async def decode(
        self, image: bytes, preprocessing: Preprocessing, state: RequestState, queue: Queue
    ) -> tuple[Pixels, float]:
        """An encoded image of a request accepted by `queue` as uint8 (crop, crop, 3), and the seconds it took.

        Raises ImageError, or what `run` raises.
        """

        def small() -> Pixels | OpenedImage:
            opened = self._rules.open(image, preprocessing)
            return opened if opened.pixels > LARGE_PIXELS else opened.render()

        try:
            try:
                with queue.backlog.in_decode_pool(state):
                    result, seconds = await self._small.run(state, small)
            finally:
                self._scheduler.wake()
            if isinstance(result, np.ndarray):
                # Large images are left out: they say nothing about how long the next small one will take.
                self._load.decoded(seconds)
                return result, seconds
            pixels, more = await self._large.run(state, result.render)
            return pixels, seconds + more
        except BaseException:
            # It will never reach the engine.
            queue.backlog.answered(state)
            raise
        finally:
            queue.backlog.decoded(state)

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

    def __init__(self, threads: int, name: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waiting: list[_Job] = []
        self._numbers = itertools.count()
        self._closing = False
        self._next_sweep = 0.0
        self._change = threading.Condition()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    def __len__(self) -> int:
        return len(self._waiting)

    async def run(self, state: RequestState, work: Callable[[], T]) -> tuple[T, float]:
        """Call `work` in a thread: its result and its seconds.

        Raises ClientDisconnected or DeadlineExceeded if the request is over by then.
        """
        answer: asyncio.Future[tuple[T, float]] = asyncio.get_running_loop().create_future()
        with self._change:
            heapq.heappush(self._waiting, (state.key, next(self._numbers), state, work, answer))
            self._change.notify()
        return await answer

    def close(self) -> None:
        """Cancel waiting jobs; threads end with their current job. On the event loop."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        for *_, answer in self._waiting:
            answer.cancel()

    def _work(self) -> None:
        """The main loop of a thread."""
        while True:
            with self._change:
                while not (self._waiting or self._closing):
                    self._change.wait()
                if self._closing:
                    return
                _, _, state, work, answer = heapq.heappop(self._waiting)
                swept = self._sweep()
            for *_, over, _, waiter in swept:
                _call_back(waiter, None, over.error(_STAGE))
            if answer.done():
                continue
            try:
                started = self._clock()
                if state.over(started):
                    raise state.error(_STAGE)
                outcome: Any = work(), self._clock() - started
                failure: BaseException | None = None
            except BaseException as error:  # noqa: BLE001 (it is raised in the caller)
                outcome, failure = None, error
            _call_back(answer, outcome, failure)
            # An idle thread must not keep an image alive.
            del work, answer, outcome, failure, state, swept

    def _sweep(self) -> list[_Job]:
        """Now and then, take out the jobs of requests that are over: those at the end may never get their turn."""
        now = self._clock()
        if now < self._next_sweep:
            return []
        self._next_sweep = now + _SWEEP_SECONDS
        over = [job for job in self._waiting if job[2].over(now)]
        if over:
            numbers = {job[1] for job in over}
            self._waiting = [job for job in self._waiting if job[1] not in numbers]
            heapq.heapify(self._waiting)
        return over


def _call_back(answer: "asyncio.Future[Any]", outcome: Any, failure: BaseException | None) -> None:
    loop = answer.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(_settle, answer, outcome, failure)


def _settle(answer: "asyncio.Future[Any]", outcome: Any, failure: BaseException | None) -> None:
    if answer.done():
        return
    if failure is not None:
        answer.set_exception(failure)
    else:
        answer.set_result(outcome)
