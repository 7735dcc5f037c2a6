"""The proof of a bundle: it gives its golden outputs here, at which speed, and with how much memory.

It runs in a process of its own (`service.models.trial`), and its result is what the serving process goes by.
"""

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from service.bundle import Bundle, content_digest, read_bundle
from service.engine import Device, Engine, Tuning
from service.engine_timer import time_runs
from service.host import peak_bytes, reset_peak, resident_bytes
from service.models.verify import verify_golden
from service.scheduling.cost import candidate_sizes, worthwhile_sizes

_MAX_RUNS, _MAX_SECONDS = 3, 0.5
"""Timed runs of each batch size: three, or fewer once they have taken this long together."""

_MIN_SPEEDUP, _LONG_SECONDS = 1.25, 0.02
"""All threads must make a single image faster than one thread by this factor: else they only wait for each other, and
take cores from the decoders. A model that takes longer than this for an image always gains from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How the service runs its engines."""

    device: Device
    number: int
    """Of the GPU."""
    threads: int
    """Cores to use."""
    intra_op_threads: int
    """0 to choose between one and all of them for each model."""
    max_batch: int
    tuning: Tuning

    def engine(self, bundle: Bundle, *, threads: int) -> Engine:
        """An engine for a bundle. Raises EngineError."""
        return Engine(bundle.model_path, device=self.device, number=self.number, threads=threads, tuning=self.tuning)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What the proof of a bundle found."""

    digest: str
    """`service.bundle.content_digest` of what was proven."""
    threads: int
    """The number of threads that pays."""
    seconds: dict[int, float]
    """Fastest run of each batch size that pays."""
    weights_bytes: int
    """Growth of resident memory by the loaded model."""
    arena_bytes: int
    """Growth beyond that by the largest batch and the golden outputs."""
    peak_bytes: int
    """Largest growth at any moment, while it was loaded included."""


def prove(folder: Path, options: EngineOptions) -> Proof:
    """Read, load, verify and time the bundle in `folder`. Raises BundleError or EngineError."""
    bundle = read_bundle(folder)
    digest = content_digest(folder)
    before = resident_bytes()
    has_peak = _reset_peak()
    engine, threads = _open(bundle, options)
    try:
        loaded = resident_bytes()
        verify_golden(bundle, engine)
        seconds = _time_sizes(bundle, engine, threads=threads, max_batch=options.max_batch)
        largest = blank(bundle, max(seconds))
        engine.shrink(largest)
        engine.run(largest)
        weights, arena = max(0, loaded - before), max(0, resident_bytes() - loaded)
        peak = peak_bytes() - before if has_peak else 0
    finally:
        engine.close()
    return Proof(
        digest=digest,
        threads=threads,
        seconds=seconds,
        weights_bytes=weights,
        arena_bytes=arena,
        peak_bytes=max(peak, weights + arena),
    )


def blank(bundle: Bundle, size: int) -> npt.NDArray[np.uint8]:
    """A batch of black images, uint8 (size,H,W,3)."""
    return np.zeros((size, *bundle.manifest.input.shape[1:]), dtype=np.uint8)


def _reset_peak() -> bool:
    try:
        reset_peak()
    except OSError:  # the system does not report a peak
        return False
    return True


def _open(bundle: Bundle, options: EngineOptions) -> tuple[Engine, int]:
    """An engine, and its number of threads: as set, else one or all, whichever pays for this model."""
    threads = options.intra_op_threads or options.threads
    engine = options.engine(bundle, threads=threads)
    if options.intra_op_threads or threads == 1 or options.device != "cpu":
        return engine, threads
    seconds = _time(bundle, engine, 1).fastest
    if seconds > _LONG_SECONDS:
        return engine, threads
    single = options.engine(bundle, threads=1)
    if _time(bundle, single, 1).fastest > _MIN_SPEEDUP * seconds:
        single.close()
        return engine, threads
    engine.close()
    return single, 1


@dataclass(frozen=True, slots=True)
class _Timing:
    """Runs of one batch size."""

    fastest: float
    """Seconds of the fastest one: interference only makes a run longer, and the cost model follows it by live timings.
    """
    cpu: float
    """Least CPU seconds of one, all threads together."""
    total: float
    """Seconds of all."""


def _time_sizes(bundle: Bundle, engine: Engine, *, threads: int, max_batch: int) -> dict[int, float]:
    """Time the batch sizes that a model may run: seconds by size, of those that pay.

    On the CPU that is judged by CPU time: beside traffic, at low priority, a long run is interrupted more often than a
    short one, and every larger batch would seem not to pay.
    """
    limit = min(max_batch, bundle.manifest.max_batch or max_batch)
    seconds: dict[int, float] = {}
    costs: dict[int, float] = {}
    for size in candidate_sizes(limit):
        timing = _time(bundle, engine, size)
        costs[size] = timing.cpu if engine.device == "cpu" else timing.fastest
        # Of a single thread, CPU time is the duration on an idle core.
        seconds[size] = costs[size] if threads == 1 else timing.fastest
        # Two sizes in a row do not pay and a run takes long: the next size would only cost time and memory.
        if timing.total > _MAX_SECONDS and len(costs) >= len(worthwhile_sizes(costs)) + 2:
            break
    for larger, smaller in pairwise(sorted(seconds, reverse=True)):
        # A smaller batch can be run padded to a larger one: if it took longer than that, it was disturbed.
        seconds[smaller] = min(seconds[smaller], seconds[larger])
        costs[smaller] = min(costs[smaller], costs[larger])
    return {size: seconds[size] for size in worthwhile_sizes(costs)}


def _time(bundle: Bundle, engine: Engine, size: int) -> _Timing:
    images, cpu = blank(bundle, size), list[float]()

    def run() -> None:
        started = time.process_time()
        engine.run(images)
        cpu.append(time.process_time() - started)

    runs = time_runs(run, seconds=_MAX_SECONDS, max_runs=_MAX_RUNS)
    return _Timing(fastest=min(runs), cpu=min(cpu), total=sum(runs))
