"""A request is taken only if there is room for it and it can finish in time; else it is told when to come back."""

import time
from contextlib import ExitStack

import numpy as np
import pytest

from service.errors import Overloaded
from service.scheduling.admission import Admission
from service.scheduling.cost import Cost, Load
from service.scheduling.request import Priority, RequestState
from service.scheduling.scheduler import Queue, Scheduler


def no_engine(_: object) -> tuple[np.ndarray, np.ndarray]:
    raise AssertionError("nothing is run here")


class World:
    """Admission before a model whose single image takes 10 ms, and no larger batches."""

    def __init__(self, *, max_images_per_request: int = 100, max_bytes: int = 1000, margin: float = 1.0) -> None:
        self.load = Load()
        self.queue = Queue("ten-ms", no_engine, Cost({1: 0.010}, self.load))
        scheduler = Scheduler(self.load)
        scheduler.add(self.queue)
        self._places = ExitStack()
        self.admission = Admission(
            scheduler, self.load, max_images_per_request=max_images_per_request, max_bytes=max_bytes, margin=margin
        )

    def accept(self, images: int, *, seconds: float = 60.0, priority: Priority = "interactive") -> RequestState:
        """A request that stays in work."""
        ticket = RequestState(seconds=seconds, priority=priority)
        self._places.enter_context(self.admission.place(ticket))
        self.admission.accept(ticket, self.queue, images, encoded=False)
        return ticket

    def predict(self, **terms: object) -> float:
        """Seconds until one more image would be answered."""
        return self.admission.predict(self.queue, RequestState(**{"seconds": 60.0, **terms}), encoded=False)  # type: ignore[arg-type]


def test_the_predicted_finish_counts_the_work_ahead_and_not_that_behind() -> None:
    world = World()
    assert world.predict() == pytest.approx(0.010)
    world.accept(3, seconds=30)
    assert world.predict() == pytest.approx(0.040)
    assert world.predict(seconds=10.0) == pytest.approx(0.010), "it would overtake them"
    world.accept(5, priority="batch", seconds=1)
    assert world.predict() == pytest.approx(0.040), "batch work waits"


def test_what_a_batch_has_taken_is_no_longer_ahead() -> None:
    world = World()
    ticket = world.accept(3, seconds=30)
    ticket.answered()
    ticket.answered()
    assert world.predict() == pytest.approx(0.020)


def test_decoding_is_part_of_the_prediction() -> None:
    world = World()
    world.load.decoded(0.5)
    ticket = RequestState(seconds=60)
    assert world.admission.predict(world.queue, ticket, 2, encoded=True) == pytest.approx(1.01, rel=0.01)
    assert world.admission.predict(world.queue, ticket, 2, encoded=False) == pytest.approx(0.02)


def test_a_request_that_cannot_finish_in_time_is_refused_at_once() -> None:
    world = World()
    world.accept(20)
    late = RequestState(seconds=0.150)
    # Its own deadline is earlier than theirs: behind nobody, it fits.
    world.admission.accept(late, world.queue, 1, encoded=False)
    with pytest.raises(Overloaded, match="the work ahead takes about") as refused:
        world.accept(30, seconds=0.2)
    assert refused.value.reason == "deadline"
    assert 0.05 < refused.value.retry_after_s < 0.2


def test_a_margin_keeps_a_part_of_the_deadline_in_reserve() -> None:
    World(margin=1.0).accept(9, seconds=0.1)
    with pytest.raises(Overloaded):
        World(margin=0.5).accept(9, seconds=0.1)


def test_nobody_accepted_is_made_late_by_somebody_in_a_greater_hurry() -> None:
    world = World()
    world.accept(20, seconds=0.25)
    with pytest.raises(Overloaded, match="accepted before it") as refused:
        world.accept(10, seconds=0.2)
    assert refused.value.retry_after_s > 0
    world.accept(2, seconds=0.2)


def test_images_beyond_the_limit_are_refused_and_places_come_back() -> None:
    world = World(max_images_per_request=3)
    world.accept(2)
    more = RequestState(seconds=60)
    with world.admission.place(more):
        world.admission.accept(more, world.queue, 1, encoded=False)
        with pytest.raises(Overloaded, match="3 images are in work and 3 are allowed") as refused:
            world.accept(1)
        assert refused.value.reason == "images"
    world.accept(1)
    assert world.admission.images == 3


def test_who_is_still_sending_takes_nobody_s_place() -> None:
    world = World(max_images_per_request=1)
    with world.admission.place(RequestState(seconds=60)), world.admission.place(RequestState(seconds=60)):
        world.accept(1)


def test_the_batch_that_runs_is_ahead_of_everybody_and_what_it_has_done_is_not() -> None:
    world = World()
    world.accept(1, priority="batch")
    world.queue.running = (time.perf_counter() - 4.0, 10.0)
    # A busy machine may let some time pass between these lines.
    assert world.predict() == pytest.approx(6.010, abs=0.5), "6 s are left of it, and 10 ms are its own"


def test_mixed_deadlines_are_predicted_as_if_counted_one_by_one() -> None:
    world = World()
    for seconds in (50, 10, 30, 20, 40):
        world.accept(1, seconds=seconds)
    assert [round(world.predict(seconds=s) * 100) for s in (5, 15, 25, 35, 45, 55)] == [1, 2, 3, 4, 5, 6]


def test_a_request_of_many_images_needs_room_for_all_of_them() -> None:
    world = World(max_images_per_request=3)
    with pytest.raises(Overloaded):
        world.accept(4)


def test_bodies_beyond_the_limit_are_refused_and_their_bytes_come_back() -> None:
    world = World(max_bytes=1000)
    first, second = RequestState(seconds=60), RequestState(seconds=60)
    with world.admission.place(first):
        world.admission.hold_bytes(first, 900)
        with world.admission.place(second), pytest.raises(Overloaded, match="hold 900 bytes and 1,000") as refused:
            world.admission.hold_bytes(second, 101)
        assert refused.value.reason == "bytes"
    assert world.admission.bytes == 0
    with world.admission.place(second):
        world.admission.hold_bytes(second, 1000)


def test_the_time_to_come_back_is_when_the_work_will_be_done() -> None:
    world = World(max_images_per_request=50)
    world.accept(50)
    with pytest.raises(Overloaded) as refused:
        world.accept(1)
    assert refused.value.retry_after_s == pytest.approx(0.5)
