"""The decode pool: nothing is decoded in vain, the most urgent comes first, and large images have their own lane."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from service.errors import BadImage, ClientDisconnected, DeadlineExceeded
from service.images import ImageRules
from service.manifest import Preprocessing
from service.scheduling.cost import Cost, Load
from service.scheduling.decode_pool import DecodePool, Lane
from service.scheduling.request import Priority, RequestState
from service.scheduling.scheduler import Queue, Scheduler
from tests.service.conftest import PNG, Clock, encoded, noise, until


class OneThread:
    """A lane of one thread, which is occupied until `free` is called."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.lane = Lane(1, "test", self.clock)
        self._hold = threading.Event()
        self._started = threading.Event()

    async def occupy(self) -> asyncio.Task[tuple[None, float]]:
        def hold() -> None:
            self._started.set()
            assert self._hold.wait(60)

        task = asyncio.create_task(self.lane.run(self.state(), hold))
        await until(self._started.is_set)
        return task

    def free(self) -> None:
        self._hold.set()

    def state(self, *, seconds: float = 60.0, priority: Priority = "interactive") -> RequestState:
        return RequestState(seconds=seconds, priority=priority, arrived_at=self.clock.now)

    async def submit(self, work: Callable[[], object], state: RequestState) -> asyncio.Task[tuple[object, float]]:
        """Start a job, and wait until it is in the queue."""
        before = len(self.lane)
        task = asyncio.create_task(self.lane.run(state, work))
        await until(lambda: len(self.lane) > before)
        return task


def drive(scenario: Callable[[OneThread], Awaitable[None]]) -> None:
    async def run() -> None:
        world = OneThread()
        try:
            await asyncio.wait_for(scenario(world), 60)
        finally:
            world.free()
            world.lane.close()

    asyncio.run(run())


def test_work_is_done_in_another_thread_and_its_error_is_raised_in_the_caller() -> None:
    async def scenario(world: OneThread) -> None:
        thread, seconds = await world.lane.run(world.state(), threading.get_ident)
        assert thread != threading.get_ident()
        assert seconds == 0

        def fail() -> None:
            raise ValueError("planted")

        with pytest.raises(ValueError, match="planted"):
            await world.lane.run(world.state(), fail)
        assert await world.lane.run(world.state(), lambda: 7) == (7, 0.0)

    drive(scenario)


def test_expired_and_abandoned_requests_are_dropped_before_decode() -> None:
    async def scenario(world: OneThread) -> None:
        decoded: list[str] = []
        holding = await world.occupy()
        states = {name: world.state() for name in ("stays", "disconnects", "cancelled")}
        states["expires"] = world.state(seconds=5)
        tasks = {
            name: await world.submit(lambda name=name: decoded.append(name), state)  # type: ignore[misc]
            for name, state in states.items()
        }
        world.clock.now += 6
        states["disconnects"].disconnected = True
        tasks["cancelled"].cancel()
        world.free()
        await holding
        results = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
        assert decoded == ["stays"]
        assert isinstance(results["disconnects"], ClientDisconnected)
        assert isinstance(results["expires"], DeadlineExceeded)
        assert isinstance(results["cancelled"], asyncio.CancelledError)

    drive(scenario)


def test_requests_that_expire_behind_others_are_told_before_their_turn() -> None:
    async def scenario(world: OneThread) -> None:
        holding = await world.occupy()
        late = await world.submit(lambda: None, world.state(seconds=5, priority="batch"))
        others = [await world.submit(lambda: None, world.state()) for _ in range(20)]
        finished: list[object] = []
        for task in (late, *others):
            task.add_done_callback(finished.append)
        world.clock.now += 6
        world.free()
        with pytest.raises(DeadlineExceeded):
            await late
        await asyncio.gather(holding, *others)
        assert finished.index(late) == 0

    drive(scenario)


def test_the_most_urgent_is_decoded_first() -> None:
    async def scenario(world: OneThread) -> None:
        decoded: list[int] = []
        tasks: list[Awaitable[object]] = [await world.occupy()]
        states = [
            (1, world.state(seconds=5, priority="batch")),
            (2, world.state(seconds=50)),
            (3, world.state(seconds=40)),
        ]
        for number, state in states:
            tasks.append(await world.submit(lambda number=number: decoded.append(number), state))  # type: ignore[misc]
        world.free()
        await asyncio.gather(*tasks)
        assert decoded == [3, 2, 1]

    drive(scenario)


def test_closing_cancels_waiting_jobs() -> None:
    async def scenario(world: OneThread) -> None:
        holding = await world.occupy()
        tasks = [await world.submit(lambda: None, world.state()) for _ in range(4)]
        world.lane.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        world.free()
        await holding

    drive(scenario)


def test_decoding_is_counted_in_the_backlog_and_large_images_do_not_teach_the_cost_model() -> None:
    preprocessing = Preprocessing(resize=8, crop=8, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    ticks = iter(range(1000))
    load = Load(clock=lambda: float(next(ticks)))
    scheduler = Scheduler(load)
    queue = Queue("any", lambda _: (_, _), Cost({1: 0.01}, Load()))  # type: ignore[arg-type,return-value]

    async def scenario() -> None:
        pool = DecodePool(scheduler, load, rules=ImageRules(max_pixels=10_000_000))
        state = RequestState(seconds=60_000, arrived_at=0.0)
        queue.backlog.accept(state, 3, encoded=True)
        try:
            pixels, seconds = await pool.decode(encoded(noise(1500, 1000)), preprocessing, state, queue)
            assert (pixels.shape, seconds >= 2, load.decode_seconds) == ((8, 8, 3), True, 0)
            await pool.decode(PNG, preprocessing, state, queue)
            assert load.decode_seconds > 0
            with pytest.raises(BadImage):
                await pool.decode(PNG[:60], preprocessing, state, queue)
        finally:
            pool.close()

    asyncio.run(scenario())
    backlog = queue.backlog
    assert (backlog.undecoded, backlog.decoding) == (0, {False: 0, True: 0})
    assert backlog.waiting == 2, "the damaged one will never reach the engine"
