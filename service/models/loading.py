"""From a bundle on disk to a model that may take traffic: read, open an engine, verify golden outputs, warm up."""

from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog

from service.bundle import Bundle, read_bundle
from service.engine import Engine, Tuning, resolve_device
from service.engine_timer import time_runs
from service.errors import BundleError
from service.host import resident_bytes
from service.models.model import Model
from service.models.verify import verify_golden
from service.scheduling.cost import Cost, Load, candidate_sizes, worthwhile_sizes
from service.scheduling.scheduler import Queue, Scheduler

log = structlog.get_logger()

_MAX_RUNS, _MAX_SECONDS = 5, 0.5
"""Timed runs of each batch size at warm-up: five, or fewer once they have taken this long together."""

_MIN_SPEEDUP, _LONG_SECONDS = 1.25, 0.02
"""All threads must make a single image faster than one thread by this factor: else they only wait for each other, and
take cores from the decoders. A model that takes longer than this for an image always gains from them."""


class Loader:
    """Loads bundles onto one device. `load` blocks; engines run on the scheduler's engine thread only."""

    def __init__(
        self,
        scheduler: Scheduler,
        load: Load,
        *,
        device: str,
        threads: int,
        intra_op_threads: int,
        max_batch: int,
        tuning: Tuning,
    ) -> None:
        """`threads`: cores to use; `intra_op_threads`: 0 to choose between one and all of them for each model.

        Raises EngineError if the device is unavailable.
        """
        self._scheduler, self._load = scheduler, load
        self._device, self._number = resolve_device(device)
        self._threads, self._intra_op_threads = threads, intra_op_threads
        self._max_batch, self._tuning = max_batch, tuning

    def load(self, folder: Path) -> Model:
        """Load the bundle in `folder`. Raises BundleError or EngineError."""
        bundle = read_bundle(folder)
        if self._device not in bundle.manifest.devices:
            raise BundleError(f"{folder}: made for {', '.join(bundle.manifest.devices)}, not for {self._device}")
        before = resident_bytes()
        engine, threads = self._open(bundle)
        loaded = resident_bytes()
        self._scheduler.on_engine(lambda: verify_golden(bundle, engine))
        baseline = _warm_up(bundle, engine, self._scheduler, max_batch=self._max_batch)
        log.info(
            "model ready",
            model=bundle.manifest.name,
            version=bundle.version,
            device=self._device,
            threads=threads,
            batch_ms={size: round(seconds * 1000, 2) for size, seconds in baseline.items()},
        )
        return Model(
            bundle,
            engine,
            Queue(
                bundle.manifest.name,
                engine.run,
                Cost(baseline, self._load),
                version=bundle.version,
                classes=bundle.manifest.num_classes,
            ),
            model_bytes=max(0, loaded - before),
            arena_bytes=max(0, resident_bytes() - loaded),
        )

    def _open(self, bundle: Bundle) -> tuple[Engine, int]:
        """An engine, and its number of threads: as set, else one or all, whichever pays for this model."""
        device, number, tuning = self._device, self._number, self._tuning
        make = partial(Engine, bundle.model_path, device=device, number=number, tuning=tuning)
        threads = self._intra_op_threads or self._threads
        engine = make(threads=threads)
        if self._intra_op_threads or threads == 1 or device != "cpu":
            return engine, threads
        seconds = min(_time(bundle, engine, self._scheduler, 1))
        if seconds > _LONG_SECONDS:
            return engine, threads
        single = make(threads=1)
        if min(_time(bundle, single, self._scheduler, 1)) > _MIN_SPEEDUP * seconds:
            single.close()
            return engine, threads
        engine.close()
        return single, 1


def _warm_up(bundle: Bundle, engine: Engine, scheduler: Scheduler, *, max_batch: int) -> dict[int, float]:
    """Time the batch sizes that a model may run, and leave the engine ready for those that pay: seconds by size.

    Each run is a job of its own on the engine thread, so that live traffic waits for one at most.
    """
    limit = min(max_batch, bundle.manifest.max_batch or max_batch)
    seconds: dict[int, float] = {}
    for size in candidate_sizes(limit):
        runs = _time(bundle, engine, scheduler, size)
        # The fastest: interference only makes a run longer, and the cost model follows it by live timings.
        seconds[size] = min(runs)
        # Two sizes in a row do not pay and a run takes long: the next size would only cost time and memory.
        if sum(runs) > _MAX_SECONDS and len(seconds) >= len(worthwhile_sizes(seconds)) + 2:
            break
    for larger, smaller in pairwise(sorted(seconds, reverse=True)):
        # A smaller batch can be run padded to a larger one: if it took longer than that, it was disturbed.
        seconds[smaller] = min(seconds[smaller], seconds[larger])
    sizes = worthwhile_sizes(seconds)
    largest = _blank(bundle, sizes[-1])
    scheduler.on_engine(partial(engine.shrink, largest))
    for size in reversed(sizes):
        scheduler.on_engine(partial(engine.run, _blank(bundle, size)))
    return {size: seconds[size] for size in sizes}


def _time(bundle: Bundle, engine: Engine, scheduler: Scheduler, size: int) -> list[float]:
    run = partial(engine.run, _blank(bundle, size))
    return time_runs(run, seconds=_MAX_SECONDS, max_runs=_MAX_RUNS, on_thread=scheduler.on_engine)


def _blank(bundle: Bundle, size: int) -> npt.NDArray[np.uint8]:
    return np.zeros((size, *bundle.manifest.input.shape[1:]), dtype=np.uint8)
