"""The decode pool: the most urgent image first, and photos of many megapixels in a lane of their own.

Without the second lane a few large photos would occupy every decoder, and small images would wait behind them.
"""

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from service.errors import ClientDisconnected, DeadlineExceeded
from service.scheduling.request import Key, RequestState

T = TypeVar("T")

_SWEEP_SECONDS = 0.05


class Lane:
    """Some threads, and the jobs that wait for them in the order of their tickets."""

    def __init__(self, threads: int, name: str) -> None:
        self._waiting: list[tuple[Key, int, RequestState, Callable[[], Any], asyncio.Future[Any]]] = []
        self._numbers = itertools.count()
        self._closing = False
        self._next_sweep = 0.0
        self._change = threading.Condition()
        for number in range(threads):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    async def run(self, ticket: RequestState, work: Callable[[], T]) -> T:
        """Do `work` in a thread. Raises ClientDisconnected or DeadlineExceeded if nobody waits for it any more."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._change:
            heapq.heappush(self._waiting, (ticket.key, next(self._numbers), ticket, work, answer))
            self._change.notify()
        return await answer

    def close(self) -> None:
        """Cancel what waits; the threads end with the job they are at. On the event loop."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        for *_, answer in self._waiting:
            answer.cancel()

    def _work(self) -> None:
        """The life of a thread."""
        while True:
            with self._change:
                while not (self._waiting or self._closing):
                    self._change.wait()
                if self._closing:
                    return
                _, _, ticket, work, answer = heapq.heappop(self._waiting)
                dead = self._dead()
            for *_, late, _, waiter in dead:
                _tell(waiter, None, _ending(late))
            if answer.done():
                continue
            try:
                outcome: Any = _unless_over(ticket, work)
                failure: BaseException | None = None
            except BaseException as error:  # noqa: BLE001 (it is raised where the work was asked for)
                outcome, failure = None, error
            _tell(answer, outcome, failure)
            # An idle thread must not keep an image.
            del work, answer, outcome, failure, ticket, dead

    def _dead(self) -> list[tuple[Key, int, RequestState, Callable[[], Any], asyncio.Future[Any]]]:
        """Take out the jobs that nobody waits for, from time to time: those at the end may never have their turn."""
        now = time.perf_counter()
        if now < self._next_sweep:
            return []
        self._next_sweep = now + _SWEEP_SECONDS
        dead = [place for place in self._waiting if place[2].over]
        if dead:
            numbers = {place[1] for place in dead}
            self._waiting = [place for place in self._waiting if place[1] not in numbers]
            heapq.heapify(self._waiting)
        return dead


def _tell(answer: asyncio.Future[Any], outcome: Any, failure: BaseException | None) -> None:
    loop = answer.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(_settle, answer, outcome, failure)


def _settle(answer: asyncio.Future[Any], outcome: Any, failure: BaseException | None) -> None:
    if answer.done():
        return
    if failure is not None:
        answer.set_exception(failure)
    else:
        answer.set_result(outcome)


def _unless_over(ticket: RequestState, work: Callable[[], T]) -> T:
    if ticket.over:
        raise _ending(ticket)
    return work()


def _ending(ticket: RequestState) -> ClientDisconnected | DeadlineExceeded:
    if ticket.gone:
        return ClientDisconnected("the client hung up")
    return DeadlineExceeded("the deadline passed before the image was decoded: nothing was computed")
