"""Lanes run batches at the same time, on no more cores than there are; jobs get their turn."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from structlog.testing import capture_logs

from service.errors import NotReady
from service.scheduling.cost import Cost, Load
from service.scheduling.layouts import Layout
from service.scheduling.outputs import Outputs, Pixels
from service.scheduling.scheduler import Queue, Scheduler
from tests.processes import PATIENCE_SECONDS
from tests.service.conftest import until
from tests.service.scheduling.test_scheduler import answer, drive

NARROW = Layout(threads=1, lanes=2, seconds={1: 0.006, 2: 0.012})
WIDE = Layout(threads=2, lanes=1, seconds={1: 0.004})


class Held:
    """An engine that holds each batch until it is let go, and notes what was computed and with how many threads."""

    def __init__(self) -> None:
        self.inside: list[tuple[int, ...]] = []
        self.threads: list[int] = []
        self.free = threading.Event()

    def run(self, images: Pixels, threads: int) -> Outputs:
        self.inside.append(tuple(int(number) for number in images[:, 0, 0, 0]))
        self.threads.append(threads)
        assert self.free.wait(PATIENCE_SECONDS)
        logits = images[:, 0, 0, :2].astype(np.float32)
        return logits, logits


@asynccontextmanager
async def running(*layouts: Layout, cores: int = 2) -> AsyncIterator[tuple[Scheduler, Queue, Held]]:
    engine, load = Held(), Load()
    scheduler = Scheduler(load, cores=cores)
    queue = scheduler.add(Queue("held", engine.run, Cost(layouts, load)))
    scheduler.start()
    try:
        yield scheduler, queue, engine
    finally:
        engine.free.set()
        await scheduler.close()


def ask(scheduler: Scheduler, queue: Queue, *numbers: int) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(answer(scheduler, queue, number)) for number in numbers]


def test_two_images_are_computed_at_once_and_each_gets_its_own_answer() -> None:
    async def scenario() -> None:
        async with running(NARROW) as (scheduler, queue, engine):
            tasks = ask(scheduler, queue, 1, 2)
            await until(lambda: len(engine.inside) == 2)
            tasks += ask(scheduler, queue, 3, 4, 5, 6)
            await until(lambda: len(queue) == 4)
            engine.free.set()
            assert await asyncio.gather(*tasks) == [1, 2, 3, 4, 5, 6]
            assert sorted(number for batch in engine.inside for number in batch) == [1, 2, 3, 4, 5, 6]

    drive(scenario)


def test_a_lone_image_gets_all_cores_and_the_next_ones_one_each() -> None:
    async def scenario() -> None:
        async with running(NARROW, WIDE) as (scheduler, queue, engine):
            tasks = ask(scheduler, queue, 1)
            await until(lambda: engine.threads == [2])
            tasks += ask(scheduler, queue, 2, 3, 4, 5)
            await until(lambda: len(queue) == 4)
            assert engine.threads == [2], "no core is left for them"
            engine.free.set()
            assert await asyncio.gather(*tasks) == [1, 2, 3, 4, 5]
            assert engine.threads[1] == 1

    drive(scenario)


def test_a_job_for_one_core_runs_beside_a_batch_and_one_for_all_cores_waits_and_lets_no_batch_pass() -> None:
    async def scenario() -> None:
        async with running(NARROW) as (scheduler, queue, engine):
            first = ask(scheduler, queue, 1)
            await until(lambda: len(engine.inside) == 1)
            assert await asyncio.to_thread(scheduler.on_engine, lambda: "beside", cores=1) == "beside"
            whole = asyncio.create_task(asyncio.to_thread(scheduler.on_engine, lambda: len(engine.inside)))
            await until(lambda: bool(scheduler.lanes._jobs))
            second = ask(scheduler, queue, 2)
            await until(lambda: len(queue) == 1)
            assert len(engine.inside) == 1, "a core is free, but the job comes first"
            engine.free.set()
            assert await asyncio.gather(*first, *second) == [1, 2]
            assert await whole == 1

    drive(scenario)


def test_one_lane_that_hangs_is_a_hang_of_the_engine_until_it_comes_back() -> None:
    async def scenario() -> None:
        async with running(NARROW) as (scheduler, queue, engine):
            scheduler._watchdog.stop()
            (task,) = ask(scheduler, queue, 1)
            await until(lambda: len(engine.inside) == 1)
            scheduler._watchdog.look()
            scheduler._watchdog._seconds = dict.fromkeys(scheduler._watchdog._seconds, 1000.0)
            scheduler._watchdog.look()
            for attempt in (task, answer(scheduler, queue, 2)):
                with pytest.raises(NotReady, match="the engine has been at a batch of 1 of model 'held'"):
                    await attempt
            assert scheduler.lanes.runs[0].cores == 1, "the other core is free, and yet nothing is promised"
            engine.free.set()
            await until(lambda: scheduler.hang is None)
            assert await answer(scheduler, queue, 3) == 3

    with capture_logs():
        drive(scenario)


def test_no_more_lanes_are_started_than_there_are_cores() -> None:
    async def scenario() -> None:
        many = Layout(threads=1, lanes=64, seconds={1: 0.001})
        async with running(many, cores=3) as (scheduler, queue, engine):
            tasks = ask(scheduler, queue, *range(1, 8))
            await until(lambda: len(engine.inside) == 3)
            assert sum(run.cores for run in scheduler.lanes.runs) == 3
            engine.free.set()
            assert await asyncio.gather(*tasks) == list(range(1, 8))

    drive(scenario)


def test_waiting_images_are_shared_among_the_lanes_whose_cores_no_decoder_takes() -> None:
    layout = Layout(threads=1, lanes=4, seconds={1: 0.001, 2: 0.0015, 4: 0.002, 8: 0.003})
    cost = Cost((layout,), Load())
    sizes = {decoding: cost.plan(8, free=4, decoding=decoding) for decoding in (0, 2, 3, 4)}
    assert {decoding: plan and plan.images for decoding, plan in sizes.items()} == {0: 2, 2: 4, 3: 8, 4: 8}


def test_a_job_beside_the_lanes_takes_no_core_from_batches_and_has_a_low_priority() -> None:
    async def scenario() -> None:
        async with running(WIDE, cores=2) as (scheduler, queue, engine):
            begun, end, seen = threading.Event(), threading.Event(), dict[str, object]()

            def job() -> str:
                seen["thread"] = threading.current_thread().name
                seen["priority"] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
                begun.set()
                assert end.wait(PATIENCE_SECONDS)
                return "done"

            doing = asyncio.create_task(asyncio.to_thread(scheduler.on_engine, job, cores=0))
            await until(begun.is_set)
            engine.free.set()
            assert await answer(scheduler, queue, 7) == 7
            assert engine.threads == [2], "all cores are its own"
            end.set()
            assert await doing == "done"
            assert seen["thread"] == "engine-beside"
            assert seen["priority"] == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)

    drive(scenario)
