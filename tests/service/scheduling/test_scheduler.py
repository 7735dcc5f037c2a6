"""Batches are the images waiting when the engine is free, the most urgent first; each answer reaches its request."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import ClientDisconnected, DeadlineExceeded
from service.scheduling.cost import Cost, Load
from service.scheduling.request import Priority, RequestState
from service.scheduling.scheduler import Batch, Pixels, Queue, Scheduler
from tests.processes import PATIENCE_SECONDS
from tests.service.conftest import Clock, images_waiting, until


class Echo:
    """An engine whose answer to an image is the id in its pixels; it can be held up, and made to fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()
        self.started = threading.Event()
        self.fail_on: int | None = None

    def run(self, images: Pixels, threads: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logits [id, -id]. Black rows are padding: ids begin at 1."""
        self.started.set()
        assert self.free.wait(60)
        ids = images[:, 0, 0].astype(np.float32) @ np.array([1, 256, 0], dtype=np.float32)
        self.batches.append([int(number) for number in ids])
        if self.fail_on in self.batches[-1]:
            raise RuntimeError("engine fault")
        logits = np.stack([ids, -ids], axis=1)
        return logits, logits


def image(number: int) -> Pixels:
    return np.full((2, 2, 3), [number % 256, number // 256, 0], dtype=np.uint8)


def new_queue(echo: Echo, sizes: Sequence[int] = (1, 2, 3, 4), name: str = "echo") -> Queue:
    """The queue of a model whose batches all take the same time, so that it always pays to take more."""
    return Queue(name, echo.run, Cost(dict.fromkeys(sizes, 0.001), Load()))


@asynccontextmanager
async def running(sizes: Sequence[int] = (1, 2, 3, 4)) -> AsyncIterator[tuple[Scheduler, Queue, Echo]]:
    scheduler, echo = Scheduler(Load()), Echo()
    queue = new_queue(echo, sizes)
    scheduler.add(queue)
    scheduler.start()
    try:
        yield scheduler, queue, echo
    finally:
        echo.free.set()
        await scheduler.close()


def state(seconds: float = 1e6, priority: Priority = "interactive") -> RequestState:
    return RequestState(seconds=seconds, priority=priority)


async def answer(scheduler: Scheduler, queue: Queue, number: int, by: RequestState | None = None) -> int:
    return int((await scheduler.submit(queue, image(number), by or state())).logits[0])


async def while_busy(scheduler: Scheduler, queue: Queue, echo: Echo) -> asyncio.Task[int]:
    """Put the engine to work on image 99 until `echo.free` is set."""
    echo.free.clear()
    first = asyncio.create_task(answer(scheduler, queue, 99))
    await until(echo.started.is_set)
    return first


def drive(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_SECONDS))


def test_a_single_image_starts_at_once_and_those_that_wait_meanwhile_are_one_batch() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            tasks = [await while_busy(scheduler, queue, echo)]
            tasks += [asyncio.create_task(answer(scheduler, queue, number)) for number in range(1, 7)]
            await until(lambda: images_waiting(scheduler) == 6)
            echo.free.set()
            assert await asyncio.gather(*tasks) == [99, *range(1, 7)]
            assert echo.batches == [[99], [1, 2, 3, 4], [5, 6]]

    drive(scenario)


def test_a_batch_is_padded_to_a_warmed_up_size() -> None:
    async def scenario() -> None:
        seen: list[Batch] = []
        scheduler, echo = Scheduler(Load()), Echo()
        queue = new_queue(echo, sizes=(1, 4))
        scheduler.add(queue)
        scheduler.start(seen.append)
        tasks = [await while_busy(scheduler, queue, echo)]
        tasks += [asyncio.create_task(answer(scheduler, queue, number)) for number in (1, 2, 3)]
        await until(lambda: images_waiting(scheduler) == 3)
        echo.free.set()
        assert await asyncio.gather(*tasks) == [99, 1, 2, 3]
        assert echo.batches == [[99], [1, 2, 3, 0]]
        assert [(batch.images, batch.size) for batch in seen] == [(1, 1), (3, 4)]
        await scheduler.close()

    drive(scenario)


def test_padding_contains_nothing_of_an_earlier_batch() -> None:
    async def scenario() -> None:
        async with running(sizes=(1, 4)) as (scheduler, queue, echo):
            for numbers in ((1, 2, 3, 4), (5, 6)):
                echo.started.clear()
                tasks = [await while_busy(scheduler, queue, echo)]
                tasks += [asyncio.create_task(answer(scheduler, queue, number)) for number in numbers]
                await until(lambda: images_waiting(scheduler) > 1)
                echo.free.set()
                await asyncio.gather(*tasks)
            assert echo.batches[-1] == [5, 6, 0, 0]

    drive(scenario)


def test_the_earliest_deadline_goes_first_and_batch_work_last() -> None:
    async def scenario() -> None:
        async with running(sizes=(1,)) as (scheduler, queue, echo):
            tasks = [await while_busy(scheduler, queue, echo)]
            for number, by in (
                (1, state(100, "batch")),
                (2, state(3000)),
                (3, state(1000)),
                (4, state(2000)),
                (5, state(2000, "batch")),
            ):
                tasks.append(asyncio.create_task(answer(scheduler, queue, number, by)))
            await until(lambda: images_waiting(scheduler) == 5)
            echo.free.set()
            await asyncio.gather(*tasks)
            assert echo.batches == [[99], [3], [4], [2], [1], [5]]

    drive(scenario)


def test_queues_share_one_engine_thread_and_the_most_urgent_image_decides_which_runs() -> None:
    async def scenario() -> None:
        scheduler, echo = Scheduler(Load()), Echo()
        one, other = new_queue(echo, name="one"), new_queue(echo, name="other")
        scheduler.add(one)
        scheduler.add(other)
        scheduler.start()
        tasks = [await while_busy(scheduler, one, echo)]
        for number, queue, seconds in ((1, one, 50), (2, other, 40), (3, one, 30), (4, other, 60)):
            tasks.append(asyncio.create_task(answer(scheduler, queue, number, state(seconds))))
        await until(lambda: images_waiting(scheduler) == 4)
        echo.free.set()
        assert await asyncio.gather(*tasks) == [99, 1, 2, 3, 4]
        assert echo.batches == [[99], [3, 1], [2, 4]]
        await scheduler.close()

    drive(scenario)


def test_an_expired_image_costs_no_engine_row_and_its_caller_gets_an_error() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            first = await while_busy(scheduler, queue, echo)
            late = asyncio.create_task(answer(scheduler, queue, 1, state(0.0)))
            other = asyncio.create_task(answer(scheduler, queue, 2))
            await until(lambda: images_waiting(scheduler) == 2)
            echo.free.set()
            assert (await first, await other) == (99, 2)
            with pytest.raises(DeadlineExceeded, match="nothing was computed"):
                await late
            assert echo.batches == [[99], [2]]

    drive(scenario)


def test_an_image_that_expires_behind_others_is_dropped_before_its_turn() -> None:
    async def scenario() -> None:
        async with running(sizes=(1,)) as (scheduler, queue, echo):
            first = await while_busy(scheduler, queue, echo)
            late = asyncio.create_task(answer(scheduler, queue, 1, state(0.0, "batch")))
            others = [asyncio.create_task(answer(scheduler, queue, number)) for number in range(2, 30)]
            await until(lambda: images_waiting(scheduler) == 29)
            finished: list[int] = []
            for number, task in enumerate((late, *others), start=1):
                task.add_done_callback(lambda _, number=number: finished.append(number))  # type: ignore[misc]
            echo.free.set()
            with pytest.raises(DeadlineExceeded):
                await late
            await asyncio.gather(first, *others)
            assert finished.index(1) < 3

    drive(scenario)


def test_a_queue_whose_images_expire_at_the_last_moment_does_not_block_the_next_one() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            other = scheduler.add(new_queue(echo, name="other"))
            first = await while_busy(scheduler, queue, echo)
            expiring = state(20)
            gone = asyncio.create_task(answer(scheduler, queue, 1, expiring))
            waiting = asyncio.create_task(answer(scheduler, other, 2))
            await until(lambda: images_waiting(scheduler) == 2)
            held = queue.holds

            def expire(now: float, load: Load) -> bool:
                expiring.disconnected = True
                return held(now, load)

            queue.holds = expire  # type: ignore[method-assign]
            echo.free.set()
            assert (await first, await waiting) == (99, 2)
            with pytest.raises(ClientDisconnected):
                await gone

    drive(scenario)


def test_an_image_whose_client_disconnected_costs_no_engine_row() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            first, by = await while_busy(scheduler, queue, echo), state()
            gone = [asyncio.create_task(answer(scheduler, queue, number, by)) for number in (1, 2)]
            other = asyncio.create_task(answer(scheduler, queue, 3))
            await until(lambda: images_waiting(scheduler) == 3)
            by.disconnected = True
            echo.free.set()
            assert (await first, await other) == (99, 3)
            results = await asyncio.gather(*gone, return_exceptions=True)
            assert [type(result) for result in results] == [ClientDisconnected, ClientDisconnected]
            assert echo.batches == [[99], [3]]

    drive(scenario)


def test_a_cancelled_caller_costs_no_engine_row_and_affects_no_other() -> None:
    async def scenario() -> None:
        async with running(sizes=range(1, 9)) as (scheduler, queue, echo):
            first = await while_busy(scheduler, queue, echo)
            tasks = [asyncio.create_task(answer(scheduler, queue, number)) for number in range(1, 6)]
            await until(lambda: images_waiting(scheduler) == 5)
            for task in (tasks[0], tasks[3]):
                task.cancel()
            await asyncio.sleep(0)
            echo.free.set()
            assert await first == 99
            assert [await tasks[place] for place in (1, 2, 4)] == [2, 3, 5]
            assert echo.batches == [[99], [2, 3, 5]]

    drive(scenario)


def test_a_caller_cancelled_while_its_batch_runs_affects_no_other() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            task = await while_busy(scheduler, queue, echo)
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


def test_closing_finishes_the_running_batch_and_cancels_waiting_images() -> None:
    async def scenario() -> None:
        scheduler, echo = Scheduler(Load()), Echo()
        queue = new_queue(echo, sizes=(1,))
        scheduler.add(queue)
        scheduler.start()
        tasks = [await while_busy(scheduler, queue, echo)]
        tasks += [asyncio.create_task(answer(scheduler, queue, number)) for number in (1, 2)]
        await until(lambda: images_waiting(scheduler) == 2)
        closing = asyncio.create_task(scheduler.close(timeout_seconds=PATIENCE_SECONDS))
        # A lane of the engine is told at once, before the running batch may end.
        await asyncio.sleep(0)
        echo.free.set()
        await closing
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[0] == 99
        assert all(isinstance(result, asyncio.CancelledError) for result in results[1:])

    drive(scenario)


def test_batch_work_gets_its_batches_under_interactive_load_that_never_ends() -> None:
    async def scenario() -> None:
        scheduler, echo = Scheduler(Load(), batch_share=0.2), Echo()
        queue = scheduler.add(new_queue(echo))
        scheduler.start()
        first = await while_busy(scheduler, queue, echo)
        batch_work = [asyncio.create_task(answer(scheduler, queue, n, state(priority="batch"))) for n in range(1, 7)]
        interactive = [asyncio.create_task(answer(scheduler, queue, number)) for number in range(100, 140)]
        await until(lambda: images_waiting(scheduler) == 46)
        echo.free.set()
        await asyncio.gather(first, *batch_work, *interactive)
        kinds = ["batch" if max(batch) < 99 else "interactive" for batch in echo.batches[1:]]
        assert kinds[:4] == ["interactive"] * 4
        assert kinds[4] == "batch"
        assert [number for batch in echo.batches for number in batch if number < 99] == [1, 2, 3, 4, 5, 6]
        assert max(echo.batches.index(batch) for batch in echo.batches if min(batch) < 7) <= 10
        await scheduler.close()

    drive(scenario)


def test_a_free_engine_waits_only_while_more_images_are_decoded_than_there_are_decoders() -> None:
    clock = Clock()
    load = Load(decode_threads=2, clock=clock)
    load.decoded(0.010, 1_000_000)
    queue = Queue("any", Echo().run, Cost({1: 0.005, 2: 0.010}, load))
    states = [RequestState(seconds=60, arrived_at=clock.now) for _ in range(3)]
    batch = RequestState(seconds=60, priority="batch", arrived_at=clock.now)

    async def scenario() -> None:
        scheduler = Scheduler(load)
        waiting = asyncio.create_task(scheduler.submit(scheduler.add(queue), image(1), states[0]))
        await asyncio.sleep(0)
        entries = [scheduler.entry(of) for of in (*states, batch)]
        for entry in entries[1:3]:
            scheduler.expect(queue, entry)
        assert not queue.holds(clock.now, load), "two decoders are at work on them"
        scheduler.expect(queue, entries[3])
        assert not queue.holds(clock.now, load), "batch work is not waited for"
        scheduler.expect(queue, entries[0])
        assert queue.holds(clock.now, load)
        assert not queue.holds(clock.now + 59.97, load), "its deadline is near"
        scheduler.offer(queue, entries[0], image(2))
        assert not queue.holds(clock.now, load), "it is decoded"
        for entry in entries[1:]:
            entry.settle(RuntimeError("damaged"))
            with pytest.raises(RuntimeError):
                await scheduler.outcome(queue, entry)
        assert queue.backlog.decoding == {False: 0, True: 0}
        waiting.cancel()
        await scheduler.close()

    drive(scenario)


def test_live_timings_reach_the_cost_model() -> None:
    async def scenario() -> None:
        async with running(sizes=(1,)) as (scheduler, queue, _):
            before = queue.cost.seconds(1)
            for number in range(20):
                await answer(scheduler, queue, number)
            assert queue.cost.seconds(1) != before

    drive(scenario)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.sets(st.integers(1, 9), min_size=1),
    plan=st.lists(
        st.tuples(st.sampled_from(("stays", "leaves", "disconnects", "expires")), st.integers(0, 3)),
        min_size=1,
        max_size=120,
    ),
)
def test_no_answer_is_lost_or_swapped(sizes: set[int], plan: list[tuple[str, int]]) -> None:
    """Each image carries its id; callers arrive at random moments, and some leave again or expire."""

    async def scenario() -> None:
        async with running(sorted(sizes)) as (scheduler, queue, echo):
            tasks = []
            for number, (fate, pause) in enumerate(plan, start=1):
                by = state(-1.0 if fate == "expires" else 60.0)
                task = asyncio.create_task(answer(scheduler, queue, number, by))
                tasks.append((number, fate, task))
                for _ in range(pause):
                    await asyncio.sleep(0)
                if fate == "leaves":
                    task.cancel()
                by.disconnected = fate == "disconnects"
            for number, fate, task in tasks:
                result = (await asyncio.gather(task, return_exceptions=True))[0]
                if fate == "stays":
                    assert result == number
                elif fate == "expires":
                    assert isinstance(result, DeadlineExceeded)
                else:
                    assert result == number or isinstance(result, ClientDisconnected | asyncio.CancelledError)
            assert {len(batch) for batch in echo.batches} <= sizes

    drive(scenario)
