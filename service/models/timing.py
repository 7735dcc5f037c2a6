"""How long batches of a model take, in all lanes of a layout at once: what a proof measures."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import Barrier

from service.bundle import Bundle
from service.engine import Engine
from service.engine_timer import time_runs
from service.models.engines import blank
from service.scheduling.cost import candidate_sizes, worthwhile_sizes
from service.scheduling.outputs import Pixels

_MAX_RUNS, _MAX_SECONDS = 5, 0.5
"""Timed runs of each batch size: this many, or fewer once they have taken this long in total."""

_ROUND_SECONDS = 0.02
"""Least time for which lanes are timed together, so that their start does not count."""

_LONG_SECONDS, _WAITING = 0.01, 1.1
"""Threads that share a batch longer than this wait for each other for some of the time: on idle cores it takes up to
this factor times their CPU time divided by their number. If it took longer, it was disturbed."""


@dataclass(frozen=True, slots=True)
class _Timing:
    """Runs of one batch size."""

    fastest: float
    """Seconds of the fastest one: interference only makes a run longer, and live timings adapt the cost model to it."""
    cpu: float
    """Least CPU seconds of one run, over all threads."""
    total: float
    """Total seconds of all runs."""

    def undisturbed(self, threads: int) -> float:
        """Seconds that one run takes on idle cores."""
        # For a single thread, CPU time is the duration on an idle core.
        if threads == 1:
            return self.cpu
        shared = self.cpu / threads
        return min(self.fastest, shared * _WAITING) if shared > _LONG_SECONDS else self.fastest


def time_sizes(bundle: Bundle, engine: Engine, *, threads: int, lanes: int, max_batch: int) -> dict[int, float]:
    """Time the batch sizes that a model may run, in all lanes at once: seconds by size, of those that pay off.

    On the CPU, CPU time decides which do: next to traffic, at low priority, a long run is interrupted more often than a
    short one, and no larger batch would seem to pay off.
    """
    on_cpu = engine.device == "cpu"
    seconds: dict[int, float] = {}
    costs: dict[int, float] = {}
    for size in candidate_sizes(max_batch):
        timing = _time(engine, blank(bundle, size), lanes=lanes)
        costs[size] = timing.cpu if on_cpu else timing.fastest
        seconds[size] = timing.undisturbed(threads) if on_cpu else timing.fastest
        # Two sizes in a row do not pay off and a run takes long: the next size would only cost time and memory.
        if timing.total > _MAX_SECONDS and len(costs) >= len(worthwhile_sizes(costs)) + 2:
            break
    for larger, smaller in pairwise(sorted(seconds, reverse=True)):
        # A smaller batch can be run padded to a larger one: if it took longer than that, it was disturbed.
        seconds[smaller] = min(seconds[smaller], seconds[larger])
        costs[smaller] = min(costs[smaller], costs[larger])
    return {size: seconds[size] for size in worthwhile_sizes(costs)}


def _time(engine: Engine, images: Pixels, *, lanes: int) -> _Timing:
    repeats, cpu = 1, list[float]()
    if lanes > 1:
        repeats += int(_ROUND_SECONDS / min(time_runs(partial(engine.run, images), seconds=0.0)))
    run = together(engine, images, lanes=lanes, repeats=repeats)

    def timed() -> None:
        started = time.process_time()
        run()
        cpu.append(time.process_time() - started)

    runs = time_runs(timed, seconds=_MAX_SECONDS, max_runs=_MAX_RUNS)
    return _Timing(fastest=min(runs) / repeats, cpu=min(cpu) / repeats / lanes, total=sum(runs))


def together(engine: Engine, images: Pixels, *, lanes: int, repeats: int = 1) -> Callable[[], None]:
    """A function that runs the images in all lanes at once, `repeats` times each."""

    barrier = Barrier(lanes)

    def run() -> None:
        barrier.wait()
        for _ in range(repeats):
            engine.run(images)

    def run_all() -> None:
        with ThreadPoolExecutor(lanes) as pool:
            try:
                for lane in [pool.submit(run) for _ in range(lanes)]:
                    lane.result()
            except BaseException:
                # The lanes at the barrier wait for the others, which may never have been started.
                barrier.abort()
                raise

    return run if lanes == 1 else run_all
