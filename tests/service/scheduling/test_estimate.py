"""Is the predicted finish true? Admission in front of decoders and an engine that are simulated event by event."""

import heapq
import random
import statistics
from dataclasses import dataclass, field

import pytest

from service.errors import Overloaded
from service.scheduling.admission import Admission, Place
from service.scheduling.cost import LARGE_WORK, Cost, Load
from service.scheduling.lanes import Running
from service.scheduling.loop_lag import LoopLag
from service.scheduling.request import Key, RequestState
from service.scheduling.room import Room
from service.scheduling.scheduler import Queue, Scheduler
from tests.service.conftest import Clock
from tests.service.scheduling.test_admission import no_engine

BATCHES = {1: 0.004, 2: 0.005, 4: 0.008, 8: 0.014}
SECONDS_PER_PIXEL = 1e-8
STATED_ERROR = 0.3


@dataclass(order=True)
class Image:
    """One image of a request on its way."""

    key: Key
    number: int
    work: int = field(compare=False)
    state: RequestState = field(compare=False)


class Machine:
    """Two decoders, one for large images, and an engine, as the scheduler runs them; every duration is as predicted."""

    def __init__(self, *, deadline: float, true_seconds_per_pixel: float = SECONDS_PER_PIXEL) -> None:
        self.clock = Clock()
        self.load = Load(decode_threads=2, seconds_per_pixel=SECONDS_PER_PIXEL, clock=self.clock)
        self.true_seconds_per_pixel = true_seconds_per_pixel
        self.queue = Queue("simulated", no_engine, Cost(BATCHES, self.load))
        self.scheduler = scheduler = Scheduler(self.load)
        scheduler.add(self.queue)
        room = Room(max_images=10_000, max_bytes=10**9)
        self.admission = Admission(scheduler, self.load, room, margin=0.8, batch_share=0.1, lag=LoopLag(self.clock))
        self.deadline = deadline
        self.lanes: dict[bool, list[Image]] = {False: [], True: []}
        self.free = {False: self.load.decode_threads, True: self.load.large_threads}
        self.decoded: list[Image] = []
        self.events: list[tuple[float, int, object]] = []
        self.engine_is_free = True
        self.open: dict[RequestState, tuple[Place, float, int]] = {}
        self.ratios: list[float] = []
        self.refused = self.late = 0

    def at(self, seconds: float, event: object) -> None:
        heapq.heappush(self.events, (self.clock.now + seconds, len(self.events) + random.getrandbits(60), event))

    def arrive(self, works: list[int]) -> None:
        state = RequestState(seconds=self.deadline, arrived_at=self.clock.now)
        try:
            place = self.admission.admit(state, self.queue, decoding=works[:1])
            self.admission.accept(place, self.queue, len(works), decoding=works)
        except Overloaded:
            self.refused += 1
            return
        self.open[state] = place, self.clock.now, len(works)
        for number, work in enumerate(works):
            heapq.heappush(self.lanes[work > LARGE_WORK], Image(state.key, number, work, state))

    def start_work(self) -> None:
        for large, waiting in self.lanes.items():
            while waiting and self.free[large]:
                self.free[large] -= 1
                image = heapq.heappop(waiting)
                self.at(image.work * self.true_seconds_per_pixel, ("decoded", image))
        if self.engine_is_free and self.decoded:
            plan = self.queue.cost.plan(len(self.decoded), free=1)
            assert plan
            taken = plan.images
            images = [heapq.heappop(self.decoded) for _ in range(taken)]
            seconds = self.queue.cost.seconds(self.queue.cost.padded(taken))
            self.engine_is_free = False
            run = Running(what="", started=self.clock.now, predicted=seconds, device_seconds=seconds)
            self.scheduler.lanes.runs = (run,)
            self.at(seconds, ("answered", images))

    def happen(self, event: object) -> None:
        match event:
            case ("decoded", Image() as image):
                self.free[image.work > LARGE_WORK] += 1
                self.load.decoded(image.work * self.true_seconds_per_pixel, image.work)
                self.queue.backlog.decoded(image.state, image.work)
                heapq.heappush(self.decoded, image)
            case ("answered", list() as images):
                self.engine_is_free, self.scheduler.lanes.runs = True, ()
                for image in images:
                    self.queue.backlog.answered(image.state)
                    place, since, left = self.open[image.state]
                    self.open[image.state] = place, since, left - 1
                    if left == 1:
                        del self.open[image.state]
                        place.__exit__()
                        self.ratios.append(place.predicted_seconds / (self.clock.now - since))
                        self.late += self.clock.now > image.state.deadline
            case ("arrives", list() as works):
                self.arrive(works)

    def run(self, arrivals: list[tuple[float, list[int]]]) -> None:
        for seconds, works in arrivals:
            self.at(seconds, ("arrives", works))
        while self.events:
            self.clock.now, _, event = heapq.heappop(self.events)
            self.happen(event)
            self.start_work()


def arrivals(rate: float, *, large: float, count: int = 1500, seed: int = 0) -> list[tuple[float, list[int]]]:
    """Poisson arrivals of one image, or now and then eight; `large`: the share of images of 3 to 12 megapixels."""
    chance = random.Random(seed)  # noqa: S311 (the same sequence every time)
    at, all_of_them = 0.0, []
    for _ in range(count):
        at += chance.expovariate(rate)
        images = 8 if chance.random() < 0.05 else 1
        works = [
            int(chance.uniform(3e6, 12e6)) if chance.random() < large else int(chance.lognormvariate(12.5, 0.8))
            for _ in range(images)
        ]
        all_of_them.append((at, works))
    return all_of_them


@pytest.mark.parametrize("large", [0.0, 0.1])
@pytest.mark.parametrize("rate", [50.0, 150.0, 300.0, 1000.0])
def test_half_of_all_predictions_are_within_the_stated_error(rate: float, large: float) -> None:
    machine = Machine(deadline=1.0)
    machine.run(arrivals(rate, large=large))
    errors = [abs(ratio - 1) for ratio in machine.ratios]
    assert len(errors) > 50
    assert statistics.median(errors) < STATED_ERROR, (statistics.quantiles(machine.ratios), machine.refused)


def test_under_overload_hardly_anything_that_was_accepted_is_late() -> None:
    machine = Machine(deadline=0.3)
    machine.run(arrivals(1000.0, large=0.05))
    assert machine.refused > len(machine.ratios) / 2
    assert machine.late < 0.05 * len(machine.ratios), (machine.late, len(machine.ratios))
    assert machine.admission.images == 0


def test_decoders_that_are_half_as_fast_as_at_the_start_are_learnt() -> None:
    machine = Machine(deadline=1.0, true_seconds_per_pixel=2 * SECONDS_PER_PIXEL)
    machine.run(arrivals(300.0, large=0.0))
    later = machine.ratios[200:]
    assert statistics.median(abs(ratio - 1) for ratio in later) < STATED_ERROR
