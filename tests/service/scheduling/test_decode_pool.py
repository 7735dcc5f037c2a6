"""The decode pool: nothing is decoded for nobody, the urgent come first, and large photos have their own lane."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from service.errors import ClientDisconnected, DeadlineExceeded
from service.scheduling.decode_pool import Lane
from service.scheduling.request import RequestState


def drive(scenario: Callable[[Lane, threading.Event], Awaitable[None]]) -> None:
    """With a lane of one thread that is held until the event is set."""

    async def run() -> None:
        lane, free = Lane(1, "test"), threading.Event()
        try:
            await asyncio.wait_for(scenario(lane, free), 20)
        finally:
            free.set()
            lane.close()

    asyncio.run(run())


def test_work_is_done_in_another_thread_and_its_error_is_raised_here() -> None:
    async def scenario(lane: Lane, _: threading.Event) -> None:
        assert await lane.run(RequestState(seconds=60), threading.get_ident) != threading.get_ident()

        def fail() -> None:
            raise ValueError("planted")

        with pytest.raises(ValueError, match="planted"):
            await lane.run(RequestState(seconds=60), fail)
        assert await lane.run(RequestState(seconds=60), lambda: 7) == 7

    drive(scenario)


def test_expired_and_abandoned_requests_are_dropped_before_decode() -> None:
    async def scenario(lane: Lane, free: threading.Event) -> None:
        decoded: list[str] = []
        holding = asyncio.create_task(lane.run(RequestState(seconds=60), lambda: free.wait(10)))
        await asyncio.sleep(0.01)
        tickets = {name: RequestState(seconds=60) for name in ("stays", "hangs up", "cancelled")}
        tickets["too late"] = RequestState(seconds=0.05)
        tasks = {
            name: asyncio.create_task(lane.run(ticket, lambda name=name: decoded.append(name)))  # type: ignore[misc]
            for name, ticket in tickets.items()
        }
        await asyncio.sleep(0.1)
        tickets["hangs up"].gone = True
        tasks["cancelled"].cancel()
        free.set()
        await holding
        results = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
        assert decoded == ["stays"]
        assert isinstance(results["hangs up"], ClientDisconnected)
        assert isinstance(results["too late"], DeadlineExceeded)
        assert isinstance(results["cancelled"], asyncio.CancelledError)

    drive(scenario)


def test_the_most_urgent_is_decoded_first() -> None:
    async def scenario(lane: Lane, free: threading.Event) -> None:
        decoded: list[int] = []
        tasks = [asyncio.create_task(lane.run(RequestState(seconds=60), lambda: free.wait(10)))]
        await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        for number, seconds, priority in ((1, 5, "batch"), (2, 50, "interactive"), (3, 40, "interactive")):
            ticket = RequestState(seconds=seconds, priority=priority)  # type: ignore[arg-type]
            work = lambda number=number: decoded.append(number)  # noqa: E731
            tasks.append(asyncio.create_task(lane.run(ticket, work)))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        free.set()
        await asyncio.gather(*tasks)
        assert decoded == [3, 2, 1]

    drive(scenario)


def test_closing_cancels_what_waits() -> None:
    async def scenario(lane: Lane, free: threading.Event) -> None:
        tasks = [asyncio.create_task(lane.run(RequestState(seconds=60), lambda: free.wait(10))) for _ in range(4)]
        await asyncio.sleep(0.01)
        lane.close()
        free.set()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert any(isinstance(result, asyncio.CancelledError) for result in results)

    started = time.monotonic()
    drive(scenario)
    assert time.monotonic() - started < 10, "nobody waits for a job that was never begun"
