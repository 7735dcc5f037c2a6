"""Whatever an engine, an observer or a caller does, each caller gets one outcome, its own, and nothing stays behind."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service.errors import ClientDisconnected, DeadlineExceeded, ModelFault
from service.scheduling.backlog import work_of
from service.scheduling.cost import Cost, Load
from service.scheduling.request import RequestState
from service.scheduling.scheduler import Batch, Pixels, Queue, Scheduler
from tests.service.conftest import images_waiting, until
from tests.service.scheduling.test_scheduler import Echo, answer, drive, running, state, while_busy

GUILTY = 7


async def together(scheduler: Scheduler, queue: Queue, echo: Echo, numbers: range) -> list[Any]:
    """The outcomes of images that wait while another batch runs, and so are in one batch."""
    echo.started.clear()
    first = await while_busy(scheduler, queue, echo)
    tasks = [asyncio.create_task(answer(scheduler, queue, number)) for number in numbers]
    await until(lambda: images_waiting(scheduler) == len(numbers))
    echo.free.set()
    assert await first == 99
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_of_a_batch_that_fails_only_the_guilty_image_fails_and_each_is_run_again_once() -> None:
    async def scenario() -> None:
        seen: list[Batch] = []
        async with running() as (scheduler, queue, echo):
            scheduler._on_batch = seen.append
            echo.fail_on = GUILTY
            outcomes = await together(scheduler, queue, echo, range(5, 9))
            assert outcomes[:2] == [5, 6]
            assert isinstance(outcomes[2], RuntimeError)
            assert outcomes[3] == 8
            assert sorted(echo.batches[2:]) == [[5], [6], [7], [8]]
            assert echo.batches[1] == [5, 6, 7, 8]
            retried, *singles = seen[1:]
            assert str(retried.retried) == "engine fault"
            assert [len(batch.faults) for batch in singles] == [int(batch.failed) for batch in singles]
            assert sum(batch.failed for batch in singles) == 1
            assert queue.backlog.waiting == 0

    with capture_logs():
        drive(scenario)


def test_images_that_are_run_again_keep_their_place_in_the_order_of_work() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            echo.fail_on = GUILTY
            first = await while_busy(scheduler, queue, echo)
            urgent = [asyncio.create_task(answer(scheduler, queue, number, state(30))) for number in (7, 2, 3, 4)]
            later = [asyncio.create_task(answer(scheduler, queue, number)) for number in (10, 11)]
            await until(lambda: images_waiting(scheduler) == 6)
            echo.free.set()
            await asyncio.gather(first, *urgent, *later, return_exceptions=True)
            assert echo.batches == [[99], [7, 2, 3, 4], [7], [2], [3], [4], [10, 11]]

    with capture_logs():
        drive(scenario)


WRONG: dict[str, Callable[[Any], Any]] = {
    "fewer rows": lambda logits: (logits[:-1], logits[:-1]),
    "no outputs": lambda _: (),
    "one output": lambda logits: (logits,),
    "no arrays": lambda _: None,
    "text": lambda _: "xy",
    "different outputs": lambda logits: (logits, logits[:, :1]),
    "a number": lambda logits: (logits[0, 0], logits[0, 0]),
    "whole numbers": lambda logits: (logits.astype(int), logits.astype(int)),
    "other classes": lambda logits: (logits[:, :1], logits[:, :1]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_outputs_of_a_wrong_shape_are_a_fault_of_the_model_and_free_their_callers(kind: str) -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            queue.classes = 2
            right = queue.run
            queue.run = lambda images, threads: WRONG[kind](right(images, threads)[0])
            first = await while_busy(scheduler, queue, echo)
            tasks = [asyncio.create_task(answer(scheduler, queue, number)) for number in (1, 2)]
            await until(lambda: images_waiting(scheduler) == 2)
            echo.free.set()
            for outcome in await asyncio.gather(first, *tasks, return_exceptions=True):
                assert isinstance(outcome, ModelFault)
                assert outcome.kind == "shape"
                assert "model 'echo' gave outputs of the wrong shape" in str(outcome)
            assert queue.backlog.waiting == 0
            queue.run = right
            assert await answer(scheduler, queue, 3) == 3

    with capture_logs():
        drive(scenario)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("output", [0, 1])
def test_a_row_that_is_not_finite_fails_its_own_image_and_no_other(value: float, output: int) -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            right = queue.run

            def run(images: Pixels, threads: int) -> Any:
                outputs = [array.copy() for array in right(images, threads)]
                outputs[output][outputs[0][:, 0] == GUILTY, 1] = value
                return outputs

            queue.run = run
            *others, guilty = await together(scheduler, queue, echo, range(4, 8))
            assert others == [4, 5, 6]
            assert isinstance(guilty, ModelFault)
            assert guilty.kind == "not-finite"
            assert len(echo.batches) == 2, "the row is known to be at fault: nothing is run again"

    with capture_logs():
        drive(scenario)


@pytest.mark.parametrize("error", [StopIteration(), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_an_exception_that_would_end_a_loop_is_an_error_of_the_callers(error: BaseException) -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, _):

            def run(_: Pixels, threads: int) -> Any:
                raise error

            right, queue.run = queue.run, run
            with pytest.raises(RuntimeError, match=type(error).__name__):
                await answer(scheduler, queue, 1)
            queue.run = right
            assert await answer(scheduler, queue, 2) == 2

    with capture_logs():
        drive(scenario)


def test_an_observer_that_fails_costs_no_caller_its_answer() -> None:
    def observe(_: Batch) -> None:
        raise RuntimeError("planted")

    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            scheduler._on_batch = observe
            assert await together(scheduler, queue, echo, range(1, 5)) == [1, 2, 3, 4]
            queue.cost.observe = observe  # type: ignore[method-assign,assignment]
            assert await together(scheduler, queue, echo, range(1, 5)) == [1, 2, 3, 4]

    with capture_logs():
        drive(scenario)


def test_a_deadline_is_kept_and_its_image_let_go_while_the_engine_hangs() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            states = [RequestState(seconds=1e6) for _ in range(3)]
            echo.free.clear()
            with states[0], states[1]:
                runs = asyncio.create_task(answer(scheduler, queue, 1, states[0]))
                await until(echo.started.is_set)
                waits = asyncio.create_task(answer(scheduler, queue, 2, states[1]))
                stays = asyncio.create_task(answer(scheduler, queue, 3, states[2]))
                await until(lambda: images_waiting(scheduler) == 2)
                # The heap keeps the order that it has: it has a copy of their keys.
                for soon in states[:2]:
                    soon.amend(seconds=0.05)
                for late in (runs, waits):
                    with pytest.raises(DeadlineExceeded):
                        await late
            assert not echo.free.is_set()
            assert images_waiting(scheduler) == 1, "the late one is let go of at once"
            echo.free.set()
            assert await stays == 3
            assert echo.batches == [[1], [3]]

    with capture_logs():
        drive(scenario)


def test_a_client_that_leaves_is_let_go_while_the_engine_hangs() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            first, by = await while_busy(scheduler, queue, echo), state()
            gone = asyncio.create_task(answer(scheduler, queue, 1, by))
            await until(lambda: images_waiting(scheduler) == 1)
            by.leave()
            with pytest.raises(ClientDisconnected):
                await gone
            assert images_waiting(scheduler) == 0
            echo.free.set()
            assert await first == 99

    with capture_logs():
        drive(scenario)


def test_an_earlier_deadline_from_the_body_is_kept_too_and_an_answered_request_leaves_no_timer() -> None:
    async def scenario() -> None:
        async with running() as (scheduler, queue, echo):
            first, by = await while_busy(scheduler, queue, echo), RequestState(seconds=600)
            with by:
                by.amend(seconds=0.05)
                with pytest.raises(DeadlineExceeded):
                    await answer(scheduler, queue, 1, by)
            echo.free.set()
            await first
            with RequestState(seconds=600) as by:
                assert await answer(scheduler, queue, 2, by) == 2
                timer = by._timer
            assert timer is not None
            assert timer.cancelled()
            assert by._awaited == set()

    with capture_logs():
        drive(scenario)


class Chaos:
    """An engine that does what a plan says at each call, and numbers its answers as `Echo` does."""

    def __init__(self, plan: list[str]) -> None:
        self.echo, self._plan = Echo(), iter(plan)

    def run(self, images: Pixels, threads: int) -> Any:
        logits = self.echo.run(images, threads)[0]
        what = next(self._plan, "right")
        if what == "raises":
            raise RuntimeError("planted")
        if what == "nan":
            logits = logits.copy()
            logits[0] = np.nan
            return logits, logits
        return (logits, logits) if what == "right" else WRONG[what](logits)


async def accepted(scheduler: Scheduler, queue: Queue, number: int, by: RequestState) -> int:
    queue.backlog.accept(by, work_of(1, ()))
    return await answer(scheduler, queue, number, by)


def _explode(_: object) -> None:
    raise ValueError("planted")


@settings(max_examples=40, deadline=None)
@given(
    engine=st.lists(st.sampled_from(("right", "raises", "nan", *WRONG)), max_size=30),
    callers=st.lists(
        st.tuples(st.sampled_from(("stays", "cancelled", "leaves", "expires", "ends early")), st.integers(0, 3)),
        min_size=1,
        max_size=40,
    ),
    observer=st.sampled_from((None, _explode)),
)
def test_each_caller_gets_one_outcome_of_its_own_whatever_fails(
    engine: list[str], callers: list[tuple[str, int]], observer: Callable[[object], None] | None
) -> None:
    async def scenario() -> None:
        chaos, load = Chaos(engine), Load()
        scheduler = Scheduler(load)
        costs = Cost(dict.fromkeys((1, 2, 4), 0.001), load)
        queue = scheduler.add(Queue("chaos", chaos.run, costs, classes=2))
        scheduler.start(observer)
        unhandled: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        tasks, states = [], []
        for number, (fate, pause) in enumerate(callers, start=1):
            by = RequestState(seconds=-1.0 if fate == "expires" else 60.0)
            tasks.append(asyncio.create_task(accepted(scheduler, queue, number, by)))
            states.append(by)
            for _ in range(pause):
                await asyncio.sleep(0)
            if fate == "cancelled":
                tasks[-1].cancel()
            elif fate == "leaves":
                by.leave()
            elif fate == "ends early":
                by.expire()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for number, ((fate, _), outcome) in enumerate(zip(callers, outcomes, strict=True), start=1):
            allowed: tuple[type, ...] = {
                "stays": (ModelFault, RuntimeError),
                "cancelled": (ModelFault, RuntimeError, asyncio.CancelledError),
                "leaves": (ModelFault, RuntimeError, ClientDisconnected),
                "ends early": (ModelFault, RuntimeError, DeadlineExceeded),
                "expires": (DeadlineExceeded,),
            }[fate]
            assert outcome == number or isinstance(outcome, allowed)
            if set(engine) <= {"right"} and fate == "stays":
                assert outcome == number
        backlog = queue.backlog
        assert (backlog.waiting, backlog.undecoded, len(queue)) == (0, 0, 0)
        assert all(not by._awaited for by in states)
        await scheduler.close()
        assert unhandled == []

    with capture_logs():
        drive(scenario)
