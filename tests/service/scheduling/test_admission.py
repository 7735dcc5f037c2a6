"""A request is accepted only if there is room for it and it can finish in time; else it is told when to come back."""

import asyncio
from contextlib import ExitStack

import numpy as np
import pytest

from service.errors import Overloaded
from service.scheduling.admission import Admission, Place
from service.scheduling.cost import Cost, Load
from service.scheduling.lanes import Running
from service.scheduling.loop_lag import LoopLag
from service.scheduling.request import Priority, RequestState
from service.scheduling.room import Room
from service.scheduling.scheduler import Queue, Scheduler
from tests.service.conftest import Clock

HALF_A_SECOND = 1_000_000
"""Work of decoding, in pixels, on a machine that takes 500 ns for each."""


def no_engine(_: object, threads: int) -> tuple[np.ndarray, np.ndarray]:
    raise AssertionError("nothing is run here")


class World:
    """Admission before a model whose single image takes 10 ms, and no larger batches."""

    def __init__(
        self,
        *,
        max_images: int = 100,
        max_bytes: int = 1000,
        margin: float = 1.0,
        reserved: float = 0.0,
        large: float = 1.0,
    ) -> None:
        self.clock = Clock()
        self.load = Load(seconds_per_pixel=5e-7, clock=self.clock)
        self.queue = Queue("ten-ms", no_engine, Cost({1: 0.010}, self.load))
        self.scheduler = scheduler = Scheduler(self.load)
        scheduler.add(self.queue)
        self.places = ExitStack()
        self.lag = LoopLag(self.clock)
        self.room = Room(
            max_images=max_images,
            max_bytes=max_bytes,
            reserved_fraction=reserved,
            large_body_bytes=100,
            large_bodies_fraction=large,
        )
        self.admission = Admission(scheduler, self.load, self.room, margin=margin, batch_share=0.2, lag=self.lag)

    def state(self, *, seconds: float = 60.0, priority: Priority = "interactive") -> RequestState:
        return RequestState(seconds=seconds, priority=priority, arrived_at=self.clock.now)

    def admit(self, state: RequestState | None = None) -> Place:
        return self.admission.admit(state or self.state(), self.queue)

    def accept(self, images: int, *, seconds: float = 60.0, priority: Priority = "interactive") -> RequestState:
        """A request that stays in work."""
        state = self.state(seconds=seconds, priority=priority)
        place = self.places.enter_context(self.admit(state))
        self.admission.accept(place, self.queue, images)
        return state

    def predict(self, *, seconds: float = 60.0, priority: Priority = "interactive") -> float:
        """Seconds until one more image would be answered."""
        return self.admission.predict(self.queue, self.state(seconds=seconds, priority=priority))


def test_the_predicted_finish_counts_the_work_ahead_and_not_that_behind() -> None:
    world = World()
    assert world.predict() == pytest.approx(0.010)
    world.accept(3, seconds=30)
    assert world.predict() == pytest.approx(0.040)
    assert world.predict(seconds=10.0) == pytest.approx(0.010), "it would overtake them"
    world.accept(5, priority="batch", seconds=1)
    assert world.predict() == pytest.approx(0.050), "batch work has one turn in five"


def test_answered_images_are_no_longer_ahead() -> None:
    world = World()
    state = world.accept(3, seconds=30)
    world.queue.backlog.answered(state)
    world.queue.backlog.answered(state)
    assert world.predict() == pytest.approx(0.020)


def test_decoding_is_part_of_the_prediction() -> None:
    world = World()
    state = world.state()
    assert world.admission.predict(world.queue, state, 2) == pytest.approx(0.02)
    # Two of 0.5 s each by the one decoder, and the last one's batch.
    decoding = [HALF_A_SECOND, HALF_A_SECOND]
    assert world.admission.predict(world.queue, state, 2, decoding=decoding) == pytest.approx(1.01)


def test_a_request_that_cannot_finish_in_time_is_rejected_at_once() -> None:
    world = World()
    world.accept(20)
    # Its own deadline is earlier than theirs: nothing is ahead of it.
    world.accept(1, seconds=0.150)
    with pytest.raises(Overloaded, match="the work ahead takes about") as rejected:
        world.accept(30, seconds=0.2)
    assert rejected.value.reason == "deadline"
    assert rejected.value.retry_after_s == pytest.approx(0.31 - 0.2)


def test_time_that_has_passed_since_arrival_counts() -> None:
    world = World()
    state = world.state(seconds=0.1)
    world.clock.now += 0.095
    with pytest.raises(Overloaded, match="the deadline leaves 5 ms"):
        world.admit(state)


def test_heads_that_may_have_their_chance_take_a_place_for_a_while() -> None:
    """Many heads arrive before the images of the first: all would be promised the same place."""
    world = World()

    def late() -> bool:
        return world.admission.late_by_head(world.queue, world.state(seconds=0.035)) > 0

    assert [late() for _ in range(5)] == [False, False, False, True, True]
    world.admission.accept(world.admit(), world.queue, 0)
    assert [late(), late()] == [False, True], "one has come"
    world.clock.now += 0.2
    assert [late() for _ in range(4)] == [False, False, False, True], "the others are slow"


def test_the_time_to_come_back_is_that_until_such_a_request_would_be_in_time() -> None:
    world = World()
    world.accept(10, seconds=0.101)
    world.clock.now += 0.06
    state = world.state(seconds=0.05)
    world.clock.now += 0.01
    world.lag.observe(0.002, world.clock.now)
    with pytest.raises(Overloaded) as refused:
        world.admit(state)
    # Eleven images of 10 ms, of which five may be ahead: neither its age nor the loop's lag will count again.
    assert refused.value.retry_after_s == pytest.approx(0.06)
    world.lag.observe(0.3, world.clock.now)
    with pytest.raises(Overloaded) as refused:
        world.admit(state)
    assert refused.value.retry_after_s == pytest.approx(0.3), "not before the loop is back"


def test_heads_of_another_priority_take_no_place() -> None:
    world = World()
    for _ in range(100):
        assert world.admission.late_by_head(world.queue, world.state(seconds=30, priority="batch")) <= 0
    assert world.admission.late_by_head(world.queue, world.state(seconds=0.05)) <= 0


def test_a_request_that_was_too_late_makes_the_heads_of_others_be_looked_at() -> None:
    world = World()
    assert not world.admission.pressed
    with pytest.raises(Overloaded):
        world.admit(world.state(seconds=0.005))
    pressed = [world.admission.pressed]
    world.clock.now += 10
    assert [*pressed, world.admission.pressed] == [True, False]


def test_a_margin_keeps_a_part_of_the_deadline_in_reserve() -> None:
    World(margin=1.0).accept(9, seconds=0.1)
    with pytest.raises(Overloaded):
        World(margin=0.5).accept(9, seconds=0.1)


def test_no_accepted_request_is_made_late_by_a_more_urgent_one() -> None:
    world = World()
    world.accept(20, seconds=0.25)
    with pytest.raises(Overloaded, match="make an earlier one miss its deadline") as rejected:
        world.accept(10, seconds=0.2)
    assert rejected.value.retry_after_s == pytest.approx(0.3 - 0.25)
    world.accept(2, seconds=0.2)


def test_images_beyond_the_limit_are_rejected_and_room_comes_back() -> None:
    world = World(max_images=3)
    world.accept(2)
    with world.admit() as more:
        world.admission.accept(more, world.queue, 1)
        with pytest.raises(Overloaded, match="3 images are pending and 3 are allowed") as rejected:
            world.accept(1)
        assert rejected.value.reason == "images"
    world.accept(1)
    assert world.admission.images == 3


def test_a_request_that_is_still_being_sent_takes_nobody_s_room() -> None:
    world = World(max_images=1)
    with world.admit(), world.admit():
        world.accept(1)


def test_the_running_batch_is_ahead_of_everybody_but_not_what_it_has_done() -> None:
    world = World()
    world.accept(1, priority="batch")
    run = Running(what="", started=world.clock.now - 4.0, predicted=10.0, device_seconds=10.0)
    world.scheduler.lanes.runs = (run,)
    assert world.predict() == pytest.approx(6.010), "6 s are left of it, and 10 ms are its own"


def test_mixed_deadlines_are_predicted_as_if_counted_one_by_one() -> None:
    world = World()
    for seconds in (50, 10, 30, 20, 40):
        world.accept(1, seconds=seconds)
    assert [round(world.predict(seconds=s) * 100) for s in (5, 15, 25, 35, 45, 55)] == [1, 2, 3, 4, 5, 6]


def test_batch_work_is_predicted_to_get_its_turns_and_no_more() -> None:
    world = World()
    world.accept(90)
    # One turn in five: for each of its images, four of the others are done.
    assert world.predict(priority="batch") == pytest.approx(0.010 * (1 + 4))
    world.accept(2, priority="batch")
    assert world.predict(priority="batch") == pytest.approx(0.010 * (3 + 12))


def test_interactive_work_is_not_refused_for_the_sake_of_batch_work() -> None:
    world = World()
    world.accept(10, seconds=0.15, priority="batch")
    world.accept(10, seconds=0.2)


def test_the_lag_of_the_event_loop_is_part_of_the_prediction() -> None:
    world = World()
    before = world.predict()
    world.lag.observe(0.1, world.clock.now)
    assert world.predict() == pytest.approx(before + 6 * 0.1)
    with pytest.raises(Overloaded):
        world.admit(world.state(seconds=0.3))


def test_a_large_photo_on_an_idle_service_is_refused_before_it_is_decoded() -> None:
    world = World()
    state = world.state(seconds=0.05)
    with world.admit(state) as place, pytest.raises(Overloaded, match="the work ahead takes about 510 ms"):
        world.admission.accept(place, world.queue, 1, decoding=[HALF_A_SECOND])
    assert world.queue.backlog.undecoded == 0


def test_the_bytes_of_a_body_say_enough_to_refuse_it_by_its_head() -> None:
    world = World()
    with pytest.raises(Overloaded):
        world.admission.admit(world.state(seconds=0.05), world.queue, decoding=[HALF_A_SECOND])


def test_large_images_wait_for_large_ones_and_small_ones_for_small_ones() -> None:
    world = World()
    large, small = 4 * HALF_A_SECOND, HALF_A_SECOND // 10
    place = world.places.enter_context(world.admit())
    world.admission.accept(place, world.queue, 1, decoding=[large + 1])
    state = world.state(seconds=61)
    assert world.admission.predict(world.queue, state, decoding=[small]) == pytest.approx(0.06, rel=0.01)
    assert world.admission.predict(world.queue, state, decoding=[large + 1]) == pytest.approx(4.01, rel=0.01)


@pytest.mark.parametrize(("greedy", "other"), [("batch", "interactive"), ("interactive", "batch")])
def test_no_priority_class_can_fill_the_room_of_the_other(greedy: Priority, other: Priority) -> None:
    world = World(max_images=100, reserved=0.25)
    world.accept(75, priority=greedy)
    with pytest.raises(Overloaded, match=f"75 images of priority {greedy} are pending and 75 are allowed"):
        world.accept(1, priority=greedy)
    world.accept(25, priority=other)
    with pytest.raises(Overloaded, match="100 images are pending and 100 are allowed"):
        world.accept(1, priority=other)


def test_large_bodies_leave_room_for_ordinary_ones() -> None:
    world = World(max_bytes=1000, large=0.75)
    with ExitStack() as uploads:
        for _ in range(3):
            uploads.enter_context(world.admit()).hold_bytes(250)
        with world.admit() as fourth:
            fourth.hold_bytes(100)
            with pytest.raises(
                Overloaded, match="750 bytes of bodies of more than 100 are pending and 750 are allowed"
            ):
                fourth.hold_bytes(1)
            with pytest.raises(Overloaded):
                fourth.expect_bytes(300)
        with world.admit() as ordinary:
            ordinary.expect_bytes(100)
            ordinary.hold_bytes(100)
    assert world.admission.bytes == 0
    with world.admit() as large:
        large.hold_bytes(750)


def test_a_deadline_that_the_body_brings_forward_is_predicted_anew() -> None:
    world = World()
    for seconds in (10, 20, 30):
        world.accept(1, seconds=seconds)
    state = world.state(seconds=25)
    assert world.admission.predict(world.queue, state) == pytest.approx(0.03)
    state.amend(seconds=15)
    assert world.admission.predict(world.queue, state) == pytest.approx(0.02)
    state.amend(priority="batch")
    assert world.admission.predict(world.queue, state) == pytest.approx(0.04)


def test_a_body_may_give_more_time_than_a_head_whose_deadline_has_passed() -> None:
    state = RequestState(seconds=1, arrived_at=0.0, clock=lambda: 2.0)

    async def scenario() -> None:
        with state:
            state.expire()
            assert state.over(2.0)
            state.replace(seconds=60, priority="interactive")
            assert not state.over(2.0)
            answer = asyncio.get_running_loop().create_future()
            answer.set_result(7)
            assert await state.wait(answer) == 7
            state.amend(seconds=1)
            assert state.over(2.0), "its own deadline still counts"

    asyncio.run(scenario())


def test_a_request_of_many_images_needs_room_for_all_of_them() -> None:
    world = World(max_images=3)
    with pytest.raises(Overloaded):
        world.accept(4)


def test_bodies_beyond_the_limit_are_rejected_and_their_bytes_come_back() -> None:
    world = World(max_bytes=1000)
    with world.admit() as first:
        first.hold_bytes(900)
        with world.admit() as second, pytest.raises(Overloaded, match="900 bytes are pending and 1,000") as rejected:
            second.hold_bytes(101)
        assert rejected.value.reason == "bytes"
    assert world.admission.bytes == 0
    with world.admit() as third:
        third.hold_bytes(1000)


def test_the_time_to_come_back_is_when_the_work_will_be_done() -> None:
    world = World(max_images=50)
    world.accept(50)
    with pytest.raises(Overloaded) as rejected:
        world.accept(1)
    assert rejected.value.retry_after_s == pytest.approx(0.5)


def test_whatever_a_request_still_had_in_work_is_released_with_its_place() -> None:
    world = World()
    state = world.accept(3)
    backlog = world.queue.backlog
    backlog.answered(state)
    world.places.close()
    assert (world.admission.images, backlog.waiting, backlog.undecoded) == (0, 0, 0)
    # Its batch may end later than the request, if its caller was cancelled.
    backlog.answered(state)
    assert backlog.waiting == 0
