"""The decode pool: nothing is decoded in vain, the most urgent comes first, and large images have their own lane."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.errors import BadImage, ClientDisconnected, DeadlineExceeded, NotReady
from service.images import ImageRules
from service.manifest import Preprocessing
from service.scheduling.backlog import work_of
from service.scheduling.cost import LARGE_WORK, Cost, Load
from service.scheduling.decode_pool import DecodePool, Lane
from service.scheduling.outputs import Outputs, Pixels
from service.scheduling.request import Priority, RequestState
from service.scheduling.scheduler import Queue, Scheduler
from tests.processes import PATIENCE_SECONDS
from tests.service.conftest import PNG, Clock, encoded, noise, until

PREPROCESSING = Preprocessing(resize=8, crop=8, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))


def echo(pixels: Pixels, threads: int) -> Outputs:
    """Logits that are the image's pixels."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float32)
    return flat, flat


async def decoded(
    pool: DecodePool,
    scheduler: Scheduler,
    queue: Queue,
    image: bytes,
    preprocessing: Preprocessing,
    state: RequestState,
    work: int,
) -> Pixels:
    """What the engine gets of an image."""
    entry = scheduler.entry(state)
    with pool.decoding(image, preprocessing, queue, entry, work):
        output = await scheduler.outcome(queue, entry)
    return output.logits.astype(np.uint8).reshape(8, 8, 3)


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


class Watched:
    """Work that can be watched."""

    def __call__(self) -> None:
        return


def test_a_request_that_is_over_lets_go_of_its_image_while_all_threads_are_busy() -> None:
    async def scenario(world: OneThread) -> None:
        holding = await world.occupy()
        gc.disable()
        try:
            for end in (RequestState.expire, RequestState.leave, None):
                state, work = world.state(), Watched()
                image = weakref.ref(work)
                task = await world.submit(work, state)
                del work
                if end:
                    end(state)
                else:
                    task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() or isinstance(task.exception(), ClientDisconnected | DeadlineExceeded)
                del task
                await asyncio.sleep(0)
                assert image() is None
        finally:
            gc.enable()
        world.free()
        await holding
        assert await world.lane.run(world.state(), lambda: 7) == (7, 0.0)

    drive(scenario)


def test_a_thread_keeps_no_image_of_a_job_that_it_only_drops() -> None:
    async def scenario(world: OneThread) -> None:
        holding = await world.occupy()
        works = [Watched() for _ in range(3)]
        images = [weakref.ref(work) for work in works]
        states = [world.state(seconds=5, priority="batch") for _ in works]
        tasks = [await world.submit(work, state) for work, state in zip(works, states, strict=True)]
        del works
        world.clock.now += 6
        busy, go = threading.Event(), threading.Event()

        def hold() -> None:
            busy.set()
            assert go.wait(60)

        second = await world.submit(hold, world.state())
        world.free()
        try:
            await until(busy.is_set)
            await asyncio.wait(tasks)
            assert all(isinstance(task.exception(), DeadlineExceeded) for task in tasks)
            tasks.clear()
            await asyncio.sleep(0)
            gc.collect()
            assert [image() for image in images] == [None] * 3
        finally:
            go.set()
        await asyncio.gather(holding, second)

    drive(scenario)


def test_a_loop_that_is_closed_meanwhile_and_a_fault_of_its_own_leave_a_thread_alive() -> None:
    lane, go, begun = Lane(1, "test"), threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go.wait(60)

    async def abandoned() -> asyncio.AbstractEventLoop:
        task = asyncio.create_task(lane.run(RequestState(seconds=60), hold))
        await until(begun.is_set)
        loop = asyncio.get_running_loop()
        # As if it were closed between a look at it and the call.
        loop.is_closed = lambda: False  # type: ignore[method-assign]
        task.cancel()
        return loop

    async def faulty() -> None:
        state = RequestState(seconds=60)
        order = lane._turns.batch_first

        def fail(**_: bool) -> bool:
            lane._turns.batch_first = order  # type: ignore[method-assign]
            raise ValueError("planted")

        lane._turns.batch_first = fail  # type: ignore[method-assign]
        assert (await lane.run(state, lambda: 7))[0] == 7

    closed = asyncio.run(abandoned())
    go.set()
    try:
        asyncio.run(asyncio.wait_for(faulty(), 60))
    finally:
        del closed.is_closed
        closed.close()
        lane.close()


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


def test_batch_work_is_decoded_under_interactive_load_that_never_ends() -> None:
    async def scenario(world: OneThread) -> None:
        decoded: list[int] = []
        tasks: list[Awaitable[object]] = [await world.occupy()]
        for number in range(40):
            state = world.state(priority="batch" if number < 2 else "interactive")
            tasks.append(await world.submit(lambda number=number: decoded.append(number), state))  # type: ignore[misc]
        world.free()
        await asyncio.gather(*tasks)
        # The job that occupied the thread was alone: every tenth turn after it.
        assert (decoded.index(0), decoded.index(1)) == (9, 19)

    drive(scenario)


def test_an_image_that_cannot_be_in_time_is_not_decoded_any_more() -> None:
    async def scenario(world: OneThread) -> None:
        decoded: list[str] = []
        holding = await world.occupy()
        hopeless = asyncio.create_task(world.lane.run(world.state(seconds=5), lambda: decoded.append("no"), needs=2.0))
        hopeful = asyncio.create_task(world.lane.run(world.state(seconds=5), lambda: decoded.append("yes"), needs=0.5))
        await until(lambda: len(world.lane) == 2)
        world.clock.now += 4
        world.free()
        with pytest.raises(DeadlineExceeded):
            await hopeless
        await asyncio.gather(holding, hopeful)
        assert decoded == ["yes"]

    drive(scenario)


def test_an_image_whose_header_hides_its_size_leaves_the_lane_for_small_ones() -> None:
    preprocessing = PREPROCESSING
    load = Load()
    queue = Queue("any", echo, Cost({1: 0.01}, load))
    names: list[str] = []

    async def scenario() -> None:
        scheduler = Scheduler(load)
        scheduler.start()
        scheduler.add(queue)
        pool = DecodePool(scheduler, load, rules=ImageRules(max_pixels=10_000_000))
        put = pool._large.put

        def noted(*job: Any, needs: float = 0.0) -> Any:
            names.append("large")
            return put(*job, needs=needs)

        pool._large.put = noted  # type: ignore[assignment,method-assign]
        state = RequestState(seconds=60_000)
        tiff = encoded(Image.new("RGB", (1500, 1000)), "TIFF", compression="tiff_lzw")
        (work,) = pool.work_of([tiff], preprocessing)
        assert work < LARGE_WORK, "a TIFF's directory is not looked for"
        queue.backlog.accept(state, work_of(1, [work]))
        try:
            pixels = await decoded(pool, scheduler, queue, tiff, preprocessing, state, work)
        finally:
            pool.close()
            await scheduler.close()
        assert (pixels.shape, names) == ((8, 8, 3), ["large"])

    asyncio.run(scenario())


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


def test_decoding_is_counted_in_the_backlog_in_the_lane_of_each_image() -> None:
    preprocessing = PREPROCESSING
    ticks = iter(range(1000))
    load = Load(clock=lambda: float(next(ticks)))
    scheduler = Scheduler(load)
    queue = Queue("any", echo, Cost({1: 0.01}, Load()))

    async def scenario() -> None:
        scheduler.start()
        scheduler.add(queue)
        pool = DecodePool(scheduler, load, rules=ImageRules(max_pixels=10_000_000))
        state = RequestState(seconds=60_000, arrived_at=0.0)
        images = [encoded(noise(1500, 1000)), PNG, PNG[:60]]
        works = pool.work_of(images, preprocessing)
        large, small, damaged = works
        queue.backlog.accept(state, work_of(3, works))
        assert (queue.backlog.of_class[0].large, queue.backlog.of_class[0].small) == (large, small + damaged)
        try:
            pixels = await decoded(pool, scheduler, queue, images[0], preprocessing, state, large)
            assert (pixels.shape, load.decode_seconds) == ((8, 8, 3), 0)
            assert queue.backlog.of_class[0].large == 0
            await decoded(pool, scheduler, queue, images[1], preprocessing, state, small)
            assert load.decode_seconds > 0
            with pytest.raises(BadImage):
                await decoded(pool, scheduler, queue, images[2], preprocessing, state, damaged)
        finally:
            pool.close()
            await scheduler.close()

    asyncio.run(scenario())
    backlog = queue.backlog
    assert (backlog.undecoded, backlog.decoding) == (0, {False: 0, True: 0})
    assert (backlog.of_class[0].small, backlog.of_class[0].large) == (0, 0)
    assert backlog.waiting == 0


class Threads:
    """An engine that notes the threads that compute, and can be held."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.free = threading.Event()
        self.free.set()

    def run(self, pixels: Pixels, threads: int) -> Outputs:
        self.names.append(threading.current_thread().name)
        assert self.free.wait(60)
        return echo(pixels, threads)


class World:
    """Two decoders, and an engine of one core or more, with one model."""

    def __init__(self, *, cores: int = 1, any_thread: bool = True) -> None:
        load, self.engine = Load(decode_threads=2), Threads()
        self.scheduler = Scheduler(load, cores=cores)
        cost = Cost({1: 0.01}, load)
        self.queue = self.scheduler.add(Queue("any", self.engine.run, cost, any_thread=any_thread))
        self.pool = DecodePool(self.scheduler, load, rules=ImageRules(max_pixels=10_000_000))
        self.scheduler.start()
        self._hold = threading.Event()
        self._held: list[asyncio.Task[object]] = []

    def ask(self, image: bytes = PNG, state: RequestState | None = None) -> asyncio.Task[Pixels]:
        """What the engine gets of an image."""
        state = state or RequestState(seconds=60)
        (work,) = self.pool.work_of([image], PREPROCESSING)
        self.queue.backlog.accept(state, work_of(1, [work]))
        return asyncio.create_task(decoded(self.pool, self.scheduler, self.queue, image, PREPROCESSING, state, work))

    async def ask_and_hold(self) -> asyncio.Task[Pixels]:
        """The same, and keep the engine at that image until `free` is called."""
        self.engine.free.clear()
        # A decoder that is still starting does not count as spare.
        await until(lambda: self.pool._small._idle == 2)
        task = self.ask()
        await until(lambda: bool(self.engine.names))
        return task

    async def hold_decoders(self, count: int) -> None:
        """Keep so many of them busy until `free` is called."""
        begun: list[int] = []

        def hold() -> None:
            begun.append(1)
            assert self._hold.wait(60)

        self._held = [asyncio.create_task(self.pool.run(RequestState(seconds=60), hold)) for _ in range(count)]
        await until(lambda: len(begun) == count)

    def free(self) -> None:
        self._hold.set()
        self.engine.free.set()

    async def close(self) -> None:
        """End, with nothing left of any image."""
        self.free()
        await asyncio.gather(*self._held)
        await until(lambda: not self.scheduler.lanes.runs and not len(self.queue))
        backlog = self.queue.backlog
        assert backlog.decoding == {False: 0, True: 0}
        assert (backlog.waiting, backlog.undecoded, self.scheduler._expected) == (0, 0, set())
        self.pool.close()
        await self.scheduler.close(timeout_seconds=PATIENCE_SECONDS)
        assert not self.scheduler.abandoned

    @property
    def threads(self) -> list[str]:
        """Kinds of the threads that have computed."""
        return [name.rstrip("-0123456789") for name in self.engine.names]


def test_a_lone_image_is_computed_by_the_thread_that_decoded_it_and_others_by_lanes() -> None:
    async def scenario() -> None:
        world = World()
        tasks = [await world.ask_and_hold()]
        # They wait for the first one's core, and are taken once it is done.
        tasks += [world.ask(), world.ask()]
        await until(lambda: len(world.queue) == 2)
        world.free()
        await asyncio.gather(*tasks)
        await world.close()
        assert world.threads == ["decode", "engine", "engine"]

    asyncio.run(scenario())


def test_an_engine_that_is_bound_to_its_lanes_computes_lone_images_there_too() -> None:
    async def scenario() -> None:
        world = World(any_thread=False)
        await world.ask()
        await world.close()
        assert world.threads == ["engine"]

    asyncio.run(scenario())


def test_no_decoder_computes_while_others_may_need_it() -> None:
    async def scenario() -> None:
        world = World()
        large = encoded(noise(1500, 1000))
        await world.ask(large)
        await world.hold_decoders(1)
        await world.ask()
        await world.close()
        assert world.threads == ["engine", "engine"], "the decoder of large images, and the last one of small ones"

    asyncio.run(scenario())


@pytest.mark.parametrize("stage", ["waiting", "queued", "computed"])
@pytest.mark.parametrize("end", ["expire", "leave", "cancel"])
def test_nothing_is_left_of_an_image_whose_request_ends_at_any_stage(stage: str, end: str) -> None:
    async def scenario() -> None:
        world, state = World(), RequestState(seconds=60)
        others: list[asyncio.Task[Pixels]] = []
        if stage == "waiting":
            await world.hold_decoders(2)
        else:
            world.engine.free.clear()
        if stage == "queued":
            others = [world.ask()]
            await until(lambda: bool(world.engine.names))
        task = world.ask(state=state)
        reached = {
            "waiting": lambda: len(world.pool._small) == 1,
            "queued": lambda: len(world.queue) == 1,
            "computed": lambda: bool(world.engine.names),
        }
        await until(reached[stage])
        if end == "cancel":
            task.cancel()
        else:
            getattr(state, end)()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        expected = {"expire": DeadlineExceeded, "leave": ClientDisconnected, "cancel": asyncio.CancelledError}
        assert isinstance(outcome, expected[end])
        world.queue.backlog.release(state)
        world.free()
        await asyncio.gather(*others)
        await world.close()

    asyncio.run(scenario())


def test_if_the_engine_hangs_on_a_decoder_images_that_wait_for_one_get_not_ready_too() -> None:
    async def scenario() -> None:
        world = World()
        tasks = [await world.ask_and_hold()]
        await world.hold_decoders(1)
        tasks.append(world.ask())
        await until(lambda: len(world.pool._small) == 1)
        world.scheduler._give_up("the engine hangs")
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [NotReady, NotReady]
        await world.close()

    asyncio.run(scenario())


def test_closing_waits_for_an_image_that_a_decoder_computes_and_fails_a_job_that_waits_for_it() -> None:
    async def scenario() -> None:
        world = World()
        task = await world.ask_and_hold()
        job = asyncio.create_task(asyncio.to_thread(world.scheduler.on_engine, lambda: None))
        await until(lambda: bool(world.scheduler.lanes._jobs))
        closing = asyncio.create_task(world.scheduler.close(timeout_seconds=PATIENCE_SECONDS))
        await until(lambda: not any(thread.is_alive() for thread in world.scheduler.lanes._threads))
        assert not closing.done()
        world.free()
        await closing
        assert (await task).shape == (8, 8, 3)
        with pytest.raises(NotReady, match="the service has ended"):
            await job
        assert not world.scheduler.abandoned
        world.pool.close()

    asyncio.run(scenario())
