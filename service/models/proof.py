"""The proof of a bundle: it gives its golden outputs here, in which layouts, at which speed, and with how much memory.

It runs in a process of its own (`service.models.trial`), and its result is what the serving process goes by.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Barrier

from service.bundle import Bundle, content_digest, read_bundle
from service.engine import Device, Engine, Tuning, pack, resolve_device
from service.engine_timer import time_runs
from service.errors import EngineError
from service.host import peak_bytes, pss_bytes, reset_peak, resident_bytes
from service.models.engines import Engines, blank
from service.models.verify import verify_golden
from service.scheduling.cost import candidate_sizes, worthwhile_sizes
from service.scheduling.layouts import Layout, candidate_layouts, worthwhile_layouts
from service.scheduling.outputs import Pixels

_MAX_RUNS, _MAX_SECONDS = 5, 0.5
"""Timed runs of each batch size: so many, or fewer once they have taken this long together."""

_ROUND_SECONDS = 0.02
"""Least time for which lanes are timed together, so that their start does not count."""

_LONG_SECONDS, _WAITING = 0.01, 1.1
"""Threads that share a batch of over this time wait for each other for some of it: on idle cores it takes up to this
factor of their CPU time, divided among them. If it took longer, it was disturbed."""

_MAX_TRIAL_SECONDS = 30.0
"""After this time no further layouts are tried. They come in the order of their threads, all cores first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How the service runs its engines."""

    device: Device
    number: int
    """Of the GPU."""
    threads: int
    """Cores to use."""
    intra_op_threads: int
    """0 to choose for each model."""
    max_lanes: int
    """Batches at once; 0 to choose for each model."""
    max_batch: int
    tuning: Tuning

    def candidates(self) -> tuple[tuple[int, int], ...]:
        """(threads, lanes) of the layouts to try."""
        if self.device != "cpu":
            # Its lanes are streams, and the threads of a session have little to do.
            return ((1, max(1, self.max_lanes)),)
        if fixed := self.intra_op_threads:
            return ((fixed, min(max(1, self.threads // fixed), self.max_lanes or self.threads)),)
        return candidate_layouts(self.threads, max_lanes=self.max_lanes or None)

    @classmethod
    def of(
        cls, device: str, *, threads: int, intra_op_threads: int = 0, max_lanes: int = 0, max_batch: int, tuning: Tuning
    ) -> "EngineOptions":
        """Options for a device as the settings name it. Raises EngineError if it is unavailable."""
        kind, number = resolve_device(device)
        if tuning.tensorrt_cache is not None:
            # The process that proves a bundle has another current folder.
            tuning = replace(tuning, tensorrt_cache=tuning.tensorrt_cache.absolute())
        if tuning.cuda_graphs:
            # A graph that is replayed twice at once would write into the same buffers.
            max_lanes = 1
        return cls(
            device=kind,
            number=number,
            threads=threads,
            intra_op_threads=intra_op_threads,
            max_lanes=max_lanes,
            max_batch=max_batch,
            tuning=tuning,
        )

    @property
    def cores(self) -> int:
        """What all lanes have together: cores, or the streams of a GPU."""
        return max(self.threads, self.intra_op_threads) if self.device == "cpu" else max(1, self.max_lanes)

    def open(self, model: Path, threads: int, *, packed: bool) -> Engine:
        """An engine for a layout. Raises EngineError."""
        return Engine(
            model,
            device=self.device,
            number=self.number,
            threads=threads if self.device == "cpu" else self.threads,
            tuning=self.tuning,
            packed=packed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What the proof of a bundle found."""

    digest: str
    """`service.bundle.content_digest` of what was proven."""
    layouts: tuple[Layout, ...]
    """Those that pay, the one for full load first, with the fastest run of each batch size that pays."""
    weights_bytes: int
    """Growth of memory by the loaded model."""
    arena_bytes: int
    """Growth beyond that by the largest batches of all lanes."""
    peak_bytes: int
    """Largest growth at any moment, while it was loaded included."""
    note: str = ""
    """Why only one layout was tried, if others could have been."""


def prove(folder: Path, options: EngineOptions, scratch: Path | None, *, known: Proof | None = None) -> Proof:
    """Read, load, verify and time the bundle in `folder`. Raises BundleError or EngineError.

    If more than one layout pays, their common weights are in `scratch` afterwards, packed. Without such a folder, or
    without room in it, only one layout is tried. `known`: an earlier proof of the same content, of which only the
    packed weights are missing.
    """
    bundle = read_bundle(folder)
    digest = content_digest(folder)
    before, has_peak = _memory_bytes(), _reset_peak()
    model, note = bundle.model_path, ""
    if len(options.candidates()) > 1:
        try:
            model = _packed(bundle, options, scratch)
            if known:
                return known
        except (EngineError, OSError) as error:
            note = str(error)
            options = replace(options, intra_op_threads=options.threads)
    packed = model != bundle.model_path
    layouts, weights = _layouts(bundle, model, options, packed=packed)
    peak = peak_bytes() - before if has_peak else 0
    arena = _arena_bytes(bundle, model, layouts, options, packed=packed)
    return Proof(
        digest=digest,
        note=note,
        layouts=layouts,
        weights_bytes=weights,
        arena_bytes=arena,
        # Packed weights are mapped as they are; a graph has to be read, optimised and packed.
        peak_bytes=weights + arena if len(layouts) > 1 else max(peak, weights + arena),
    )


def _packed(bundle: Bundle, options: EngineOptions, scratch: Path | None) -> Path:
    """The model with packed weights in a file that can be loaded. Raises EngineError or OSError."""
    if scratch is None:
        raise FileNotFoundError("there is no folder for temporary files: set TMPDIR to one that can be written to")
    model = pack(bundle.model_path, scratch)
    # A disk that is full may leave an incomplete file.
    options.open(model, 1, packed=True).close()
    return model


def _layouts(bundle: Bundle, model: Path, options: EngineOptions, *, packed: bool) -> tuple[tuple[Layout, ...], int]:
    """The layouts that pay, each tried with a session of its own, one after the other; and the growth of memory by the
    first of these sessions: the others find memory that it has freed, or the same packed weights."""
    measured: list[Layout] = []
    before, weights = _memory_bytes(), 0
    limit = min(options.max_batch, bundle.manifest.max_batch or options.max_batch)
    end = time.monotonic() + _MAX_TRIAL_SECONDS
    for threads, lanes in options.candidates():
        engine = options.open(model, threads, packed=packed)
        weights = weights or max(0, _memory_bytes() - before)
        try:
            verify_golden(bundle, engine)
            seconds = _time_sizes(bundle, engine, threads=threads, lanes=lanes, max_batch=limit)
        finally:
            engine.close()
        measured.append(Layout(threads=threads, lanes=lanes, seconds=seconds))
        if time.monotonic() > end:
            break
    return worthwhile_layouts(measured), weights


def _arena_bytes(
    bundle: Bundle, model: Path, layouts: Sequence[Layout], options: EngineOptions, *, packed: bool
) -> int:
    """Growth of memory by the largest batches of all lanes, in sessions that are open."""
    opened = dict[int, Engine]()
    engines = Engines(bundle, opened)
    try:
        for layout in layouts:
            opened[layout.threads] = options.open(model, layout.threads, packed=packed)
        loaded = _memory_bytes()
        for layout in layouts:
            engines.shrink(layout)
            _together(opened[layout.threads], blank(bundle, layout.sizes[-1]), lanes=layout.lanes)()
        return max(0, _memory_bytes() - loaded)
    finally:
        engines.close()


def _memory_bytes() -> int:
    """Memory of this process, in which what several sessions map counts once, where the system tells that."""
    return pss_bytes() or resident_bytes()


def _reset_peak() -> bool:
    try:
        reset_peak()
    except OSError:  # the system does not report a peak
        return False
    return True


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

    def undisturbed(self, threads: int) -> float:
        """Seconds that one takes on idle cores."""
        # Of a single thread, CPU time is the duration on an idle core.
        if threads == 1:
            return self.cpu
        shared = self.cpu / threads
        return min(self.fastest, shared * _WAITING) if shared > _LONG_SECONDS else self.fastest


def _time_sizes(bundle: Bundle, engine: Engine, *, threads: int, lanes: int, max_batch: int) -> dict[int, float]:
    """Time the batch sizes that a model may run, in all lanes at once: seconds by size, of those that pay.

    On the CPU that is judged by CPU time: beside traffic, at low priority, a long run is interrupted more often than a
    short one, and every larger batch would seem not to pay.
    """
    on_cpu = engine.device == "cpu"
    seconds: dict[int, float] = {}
    costs: dict[int, float] = {}
    for size in candidate_sizes(max_batch):
        timing = _time(engine, blank(bundle, size), lanes=lanes)
        costs[size] = timing.cpu if on_cpu else timing.fastest
        seconds[size] = timing.undisturbed(threads) if on_cpu else timing.fastest
        # Two sizes in a row do not pay and a run takes long: the next size would only cost time and memory.
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
    run = _together(engine, images, lanes=lanes, repeats=repeats)

    def timed() -> None:
        started = time.process_time()
        run()
        cpu.append(time.process_time() - started)

    runs = time_runs(timed, seconds=_MAX_SECONDS, max_runs=_MAX_RUNS)
    return _Timing(fastest=min(runs) / repeats, cpu=min(cpu) / repeats / lanes, total=sum(runs))


def _together(engine: Engine, images: Pixels, *, lanes: int, repeats: int = 1) -> Callable[[], None]:
    """A function that runs the images in all lanes at once, so many times each."""

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
                # Those that have come wait for the others, which may never have been started.
                barrier.abort()
                raise

    return run if lanes == 1 else run_all
