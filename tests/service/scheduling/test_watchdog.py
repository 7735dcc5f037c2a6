"""What runs on the engine longer than it can need is noticed, answered for, and ends the process if it stays."""

import asyncio
import threading

import pytest
from structlog.testing import capture_logs

from service.errors import NotReady
from service.scheduling.cost import Cost, Load
from service.scheduling.scheduler import Batch, Queue, Scheduler
from service.scheduling.watchdog import Patience, Run, Watchdog
from tests.service.conftest import Clock, images_waiting, until
from tests.service.scheduling.test_scheduler import Echo, answer, drive, image, state, while_busy

PATIENCE = Patience(factor=20, min_seconds=10, max_seconds=120, exit_seconds=30)


class World:
    """A watchdog over whatever a test says is running; time passes in steps that it is called for."""

    run: Run | None = None

    def __init__(self) -> None:
        self.clock = Clock()
        self.hangs: list[str] = []
        self.left: list[str] = []
        self.dog = Watchdog(
            PATIENCE,
            self.clock,
            current=lambda: (self.run,) if self.run else (),
            on_hang=self.hangs.append,
            leave=self.left.append,
        )

    def begin(self, predicted: float | None) -> None:
        self.run = Run(what="a batch", started=self.clock.now, predicted=predicted)

    def live(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            self.clock.now += 0.5
            self.dog.look()


@pytest.mark.parametrize(("predicted", "limit"), [(0.001, 10), (1.0, 20), (60.0, 120), (None, 120)])
def test_the_limit_is_a_multiple_of_the_prediction_between_a_floor_and_a_ceiling(
    predicted: float | None, limit: float
) -> None:
    world = World()
    world.begin(predicted)
    world.live(limit)
    assert (world.dog.hang, world.hangs) == (None, [])
    world.live(1)
    assert world.dog.hang == f"the engine has been at a batch for over {limit} s"
    assert world.hangs == [world.dog.hang]


def test_a_run_that_lets_others_go_first_may_take_as_many_times_longer() -> None:
    world = World()
    world.run = Run(what="a job", started=world.clock.now, predicted=None, slowed=12)
    world.live(12 * 120)
    assert world.dog.hang is None
    world.live(1)
    assert world.dog.hang is not None


def test_a_run_that_comes_back_ends_the_hang_at_once() -> None:
    world = World()
    world.begin(1.0)
    world.live(25)
    reason = world.dog.hang
    world.run = None
    assert (world.dog.hang, world.hangs) == (None, [reason])
    world.begin(1.0)
    world.live(19)
    assert (world.dog.hang, world.hangs, world.left) == (None, [reason], [])


def test_a_run_that_does_not_come_back_ends_the_process_after_a_further_time() -> None:
    world = World()
    world.begin(1.0)
    world.live(50)
    assert world.left == []
    world.live(1)
    assert "the engine has been at a batch for 50 s" in world.left[0]
    assert len(world.hangs) == 1


def test_a_look_while_another_thread_asks_does_not_disturb_the_answer() -> None:
    world = World()
    world.begin(1.0)
    world.live(25)
    reason, run = world.dog.hang, world.run

    def current() -> tuple[Run, ...]:
        # As if the event loop looked just now, and the engine had come back.
        world.dog._hung = {}
        return (run,) if run else ()

    world.dog._current = current
    assert world.dog.hang == reason
    assert world.dog.hang is None


def test_runs_that_follow_each_other_are_no_hang() -> None:
    world = World()
    for _ in range(20):
        world.begin(1.0)
        world.live(15)
    assert world.hangs == []


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    world = World()
    world.begin(0.001)
    world.live(5)
    for _ in range(2):
        world.clock.now += 60
        world.dog.look()
    assert world.hangs == []
    world.live(5)
    assert len(world.hangs) == 1


class Stuck:
    """A scheduler on a clock that a test moves, whose watchdog only looks when told to."""

    def __init__(self) -> None:
        self.clock, self.echo = Clock(), Echo()
        self.left: list[str] = []
        self.batches: list[Batch] = []
        load = Load(clock=self.clock)
        self.scheduler = Scheduler(load, patience=PATIENCE, leave=self.left.append)
        self.queue = self.scheduler.add(Queue("echo", self.echo.run, Cost(dict.fromkeys((1, 2, 3, 4), 0.001), load)))

    def start(self) -> None:
        self.scheduler.start(self.batches.append)
        self.scheduler._watchdog.stop()
        self.look()

    def look(self) -> None:
        self.scheduler._watchdog.look()

    def live(self, seconds: float) -> None:
        for _ in range(round(seconds)):
            self.clock.now += 1
            self.look()


def test_while_the_engine_hangs_all_who_wait_for_it_get_not_ready_and_later_ones_too() -> None:
    async def scenario() -> None:
        stuck = Stuck()
        stuck.start()
        scheduler, queue = stuck.scheduler, stuck.queue
        running = await while_busy(scheduler, queue, stuck.echo)
        waiting = [asyncio.create_task(answer(scheduler, queue, number)) for number in (1, 2)]
        await until(lambda: images_waiting(scheduler) == 2)
        job = asyncio.create_task(asyncio.to_thread(scheduler.on_engine, lambda: None))
        await until(lambda: bool(scheduler.lanes._jobs))
        stuck.live(10)
        assert scheduler.hang is None
        stuck.live(2)
        for task in (running, *waiting, job):
            with pytest.raises(NotReady, match=r"a batch of 1 of model 'echo', predicted to take 0\.001 s"):
                await task
        assert images_waiting(scheduler) == 0
        with pytest.raises(NotReady, match="retry"):
            await answer(scheduler, queue, 3)
        with pytest.raises(NotReady):
            await asyncio.to_thread(scheduler.on_engine, lambda: None)
        # It comes back: what it gives now is for nobody, and says nothing about the next batch.
        predicted = queue.cost.seconds(1)
        stuck.echo.free.set()
        await until(lambda: bool(stuck.batches) and scheduler.hang is None)
        assert stuck.batches[0].hung
        assert queue.cost.seconds(1) == predicted
        assert await answer(scheduler, queue, 4) == 4
        assert (queue.backlog.waiting, stuck.left) == (0, [])
        await scheduler.close()

    with capture_logs():
        drive(scenario)


def test_a_job_that_hangs_is_noticed_as_a_batch_is() -> None:
    async def scenario() -> None:
        stuck = Stuck()
        stuck.start()
        end = threading.Event()
        job = asyncio.create_task(asyncio.to_thread(stuck.scheduler.on_engine, end.wait))
        await until(lambda: bool(stuck.scheduler.lanes.runs))
        waiting = asyncio.create_task(answer(stuck.scheduler, stuck.queue, 1))
        await until(lambda: images_waiting(stuck.scheduler) == 1)
        stuck.live(122)
        for task in (job, waiting):
            with pytest.raises(NotReady, match="a job"):
                await task
        stuck.live(30)
        assert "a job" in stuck.left[0]
        end.set()
        await until(lambda: stuck.scheduler.hang is None)
        assert await answer(stuck.scheduler, stuck.queue, 2) == 2
        await stuck.scheduler.close()

    with capture_logs():
        drive(scenario)


def test_closing_does_not_wait_for_an_engine_that_hangs() -> None:
    async def scenario() -> None:
        stuck = Stuck()
        stuck.start()
        running = await while_busy(stuck.scheduler, stuck.queue, stuck.echo)
        waiting = asyncio.create_task(answer(stuck.scheduler, stuck.queue, 1))
        job = asyncio.create_task(asyncio.to_thread(stuck.scheduler.on_engine, lambda: None))
        await until(lambda: bool(images_waiting(stuck.scheduler) and stuck.scheduler.lanes._jobs))
        await stuck.scheduler.close(timeout_seconds=0.01)
        assert stuck.scheduler.abandoned
        for task in (running, waiting, job):
            with pytest.raises(NotReady, match="the service has ended"):
                await task
        stuck.echo.free.set()
        await asyncio.to_thread(stuck.scheduler.lanes.join, 60)

    with capture_logs():
        drive(scenario)


def test_an_engine_thread_that_has_failed_counts_as_hung() -> None:
    async def scenario() -> None:
        stuck = Stuck()
        stuck.start()
        stuck.queue.holds = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
        waiting = asyncio.create_task(stuck.scheduler.submit(stuck.queue, image(1), state()))
        await asyncio.to_thread(stuck.scheduler.lanes.join, 60)
        stuck.live(12)
        with pytest.raises(NotReady, match="a lane has failed"):
            await waiting
        stuck.live(30)
        assert "a lane has failed" in stuck.left[0]
        await stuck.scheduler.close()

    with capture_logs():
        drive(scenario)


def test_an_image_that_is_refused_while_the_engine_hangs_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        stuck = Stuck()
        stuck.start()
        running = await while_busy(stuck.scheduler, stuck.queue, stuck.echo)
        stuck.live(12)
        with pytest.raises(NotReady):
            await running
        entry = stuck.scheduler.entry(state())
        stuck.scheduler.expect(stuck.queue, entry)
        with pytest.raises(NotReady):
            await stuck.scheduler.outcome(stuck.queue, entry)
        stuck.echo.free.set()
        await until(lambda: stuck.scheduler.hang is None)
        # It was being decoded, and is ready now: nobody wants it any more.
        stuck.scheduler.offer(stuck.queue, entry, image(1), here=True)
        assert (images_waiting(stuck.scheduler), stuck.echo.batches) == (0, [[99]])
        await stuck.scheduler.close()

    with capture_logs():
        drive(scenario)
