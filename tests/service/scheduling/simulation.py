"""The engine simulated event by event: real queues, cost model and batch former; only computing is a matter of time."""

import asyncio
import heapq
import itertools
import random
from collections.abc import Sequence

import numpy as np

from service.scheduling.cost import Cost, Load
from service.scheduling.former import BatchFormer
from service.scheduling.lanes import Running
from service.scheduling.layouts import Layout
from service.scheduling.queue import Entry, Queue
from service.scheduling.request import RequestState
from tests.service.conftest import Clock

_PIXELS = np.zeros((1, 1, 3), np.uint8)


class Engine:
    """So many cores, and the models that run on them."""

    def __init__(self, cores: int, *models: Sequence[Layout]) -> None:
        self.clock = Clock()
        self._load = load = Load(decode_threads=cores, clock=self.clock)
        self.cores = cores
        self.queues = [
            Queue(f"model-{number}", lambda pixels, threads: (pixels, pixels), Cost(layouts, load))  # type: ignore[arg-type,return-value]
            for number, layouts in enumerate(models)
        ]
        self._former = BatchFormer(load, batch_share=0.1, drop=lambda _: None)
        self._loop = asyncio.new_event_loop()
        self._runs: list[tuple[float, int, Running]] = []
        self._numbers = itertools.count()
        self.latencies: list[float] = []
        self.batches: list[Running] = []
        self.most_cores = 0

    def run(self, arrivals: Sequence[tuple[float, int]]) -> None:
        """(seconds, number of the model), one image each, in order; ends when all are answered."""
        begin = self.clock.now
        for seconds, model in arrivals:
            self._until(begin + seconds)
            self._arrive(self.queues[model])
            self._start()
        self._until(float("inf"))
        self._loop.close()

    def ask_again(self, images: int, *, pause: float) -> float:
        """Ask for one image after another, each so long after the last one's answer. Returns images per second."""
        begin = self.clock.now
        for _ in range(images):
            self._arrive(self.queues[0])
            self._start()
            self._until(float("inf"))
            self.clock.now += pause
        self._loop.close()
        return images / (self.clock.now - begin)

    def _arrive(self, queue: Queue) -> None:
        self._load.arrivals.add(queue.cost.per_image())
        state = RequestState(seconds=1e9, arrived_at=self.clock.now, clock=self.clock)
        queue.push(Entry(state=state, pixels=_PIXELS, answer=self._loop.create_future(), since=self.clock.now))

    def _until(self, end: float) -> None:
        while self._runs and self._runs[0][0] <= end:
            self.clock.now, _, run = heapq.heappop(self._runs)
            self.latencies += [self.clock.now - entry.since for entry in run.entries]
            self._start()
        if end < float("inf"):
            self.clock.now = end

    def _start(self) -> None:
        while free := self.cores - sum(run.cores for _, _, run in self._runs):
            run = self._former.next(self.queues, free)
            if run is None:
                break
            assert run.predicted is not None
            self.batches.append(run)
            heapq.heappush(self._runs, (run.started + run.predicted, next(self._numbers), run))
            self.most_cores = max(self.most_cores, sum(other.cores for _, _, other in self._runs))
        self._load.arrivals.busy(bool(self._runs))


def poisson(rate: float, count: int, *, models: int = 1, seed: int = 0) -> list[tuple[float, int]]:
    """Arrivals at `rate` a second, each for one of the models."""
    chance, at, found = random.Random(seed), 0.0, []  # noqa: S311 (the same sequence every time)
    for _ in range(count):
        at += chance.expovariate(rate)
        found.append((at, chance.randrange(models)))
    return found
