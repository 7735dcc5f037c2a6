"""Batches are what waits when the engine is free; each answer belongs to its request."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduler import Pixels, Queue, Scheduler


class Echo:
    """An engine whose answer to an image is the id in its pixels; it can be held, and told to fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()
        self.started = threading.Event()
        self.fail_on: int | None = None

    def run(self, images: Pixels) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logits [id, -id]."""
        self.started.set()
        assert self.free.wait(10)
        ids = images[:, 0, 0].astype(np.float32) @ np.array([1, 256, 0], dtype=np.float32)
        self.batches.append([int(number) for number in ids])
        if self.fail_on in self.batches[-1]:
            raise RuntimeError("engine fault")
        logits = np.stack([ids, -ids], axis=1)
        return logits, logits


def image(number: int) -> Pixels:
    return np.full((2, 2, 3), [number % 256, number // 256, 0], dtype=np.uint8)


@asynccontextmanager
async def running(max_batch: int = 4) -> AsyncIterator[tuple[Scheduler, Queue, Echo]]:
    scheduler, echo = Scheduler(), Echo()
    queue = scheduler.add("echo", echo.run, max_batch=max_batch)
    scheduler.start()
    try:
        yield scheduler, queue, echo
    finally:
        echo.free.set()
        await scheduler.close()


async def answer(scheduler: Scheduler, queue: Queue, number: int) -> int:
    return int((await scheduler.submit(queue, image(number))).logits[0])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 (another thread makes it true)
        await asyncio.sleep(0.001)


def drive(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_lone_image_starts_at_once_and_what_waits_meanwhile_is_one_batch() -> None:
    async def scenario() -> None:
        async with running(max_batch=4) as (scheduler, queue, echo):
            echo.free.clear()
            tasks = [asyncio.create_task(answer(scheduler, queue, 0))]
            await until(echo.started.is_set)
            tasks += [asyncio.create_task(answer(scheduler, queue, number)) for number in range(1, 7)]
            await until(lambda: scheduler.waiting == 6)
            echo.free.set()
            assert await asyncio.gather(*tasks) == list(range(7))
            assert echo.batches == [[0], [1, 2, 3, 4], [5, 6]]

    drive(scenario)


def test_a_cancelled_caller_costs_no_engine_row_and_harms_nobody() -> None:
    async def scenario() -> None:
        async with running(max_batch=8) as (scheduler, queue, echo):
            echo.free.clear()
            first = asyncio.create_task(answer(scheduler, queue, 0))
            await until(echo.started.is_set)
            tasks = [asyncio.create_task(answer(scheduler, queue, number)) for number in range(1, 6)]
            await until(lambda: scheduler.waiting == 5)
            for task in (tasks[0], tasks[3]):
                task.cancel()
            await asyncio.sleep(0)
            echo.free.set()
            assert await first == 0
            assert [await tasks[place] for place in (1, 2, 4)] == [2, 3, 5]
            assert echo.batches == [[0], [2, 3, 5]]

    drive(scenario)


def test_a_caller_cancelled_while_its_batch_runs_harms_nobody() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            echo.free.clear()
            task = asyncio.create_task(answer(scheduler, queue, 1))
            await until(echo.started.is_set)
            task.cancel()
            other = asyncio.create_task(answer(scheduler, queue, 2))
            await asyncio.sleep(0)
            echo.free.set()
            assert await other == 2

    drive(scenario)


def test_a_failing_batch_fails_its_callers_and_the_next_goes_on() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            echo.fail_on = 7
            with pytest.raises(RuntimeError, match="engine fault"):
                await answer(scheduler, queue, 7)
            assert await answer(scheduler, queue, 8) == 8

    drive(scenario)


def test_queues_share_one_engine_thread_and_the_longest_wait_goes_first() -> None:
    async def scenario() -> None:
        scheduler, echo = Scheduler(), Echo()
        queues = [scheduler.add(name, echo.run, max_batch=4) for name in ("a", "b")]
        scheduler.start()
        echo.free.clear()
        tasks = [asyncio.create_task(answer(scheduler, queues[0], 0))]
        await until(echo.started.is_set)
        for number, queue in ((1, queues[1]), (2, queues[0]), (3, queues[1])):
            tasks.append(asyncio.create_task(answer(scheduler, queue, number)))
            await until(lambda number=number: scheduler.waiting == number)  # type: ignore[misc]
        echo.free.set()
        assert await asyncio.gather(*tasks) == [0, 1, 2, 3]
        assert echo.batches == [[0], [1, 3], [2]]
        await scheduler.close()

    drive(scenario)


def test_closing_cancels_what_still_waits() -> None:
    async def scenario() -> None:
        scheduler, echo = Scheduler(), Echo()
        queue = scheduler.add("echo", echo.run, max_batch=1)
        scheduler.start()
        echo.free.clear()
        tasks = [asyncio.create_task(answer(scheduler, queue, number)) for number in range(3)]
        await until(echo.started.is_set)
        closing = asyncio.create_task(scheduler.close())
        await asyncio.sleep(0.01)
        echo.free.set()
        await closing
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)

    drive(scenario)


@settings(max_examples=25, deadline=None)
@given(
    max_batch=st.integers(1, 9),
    plan=st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=120),
)
def test_no_answer_is_lost_or_swapped(max_batch: int, plan: list[tuple[bool, int]]) -> None:
    """Each image carries its id; callers come at random moments and some leave again."""

    async def scenario() -> None:
        async with running(max_batch) as (scheduler, queue, echo):
            tasks = []
            for number, (leaves, pause) in enumerate(plan):
                task = asyncio.create_task(answer(scheduler, queue, number))
                tasks.append((number, leaves, task))
                for _ in range(pause):
                    await asyncio.sleep(0)
                if leaves:
                    task.cancel()
            for number, leaves, task in tasks:
                if leaves:
                    await asyncio.gather(task, return_exceptions=True)
                else:
                    assert await task == number
            assert all(len(batch) <= max_batch for batch in echo.batches)

    drive(scenario)
