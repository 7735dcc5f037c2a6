"""The proof of a bundle: that it gives its golden outputs here, in which layouts, how fast, and in how much memory.

It runs in a process of its own (`service.models.trial`), and the serving process relies on its result.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from service.bundle import Bundle, content_digest, read_bundle
from service.engine import Device, Engine, Tuning, pack, resolve_device
from service.errors import EngineError
from service.host import peak_bytes, pss_bytes, reset_peak, resident_bytes
from service.models.engines import Engines, blank
from service.models.timing import time_sizes, together
from service.models.verify import verify_golden
from service.scheduling.layouts import Layout, candidate_layouts, worthwhile_layouts

_MAX_TRIAL_SECONDS = 30.0
"""After this time no further layouts are tried. They are ordered by their threads, all cores first."""


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
            # The process that proves a bundle has another working directory.
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
    """Those that pay off, the one for full load first, with the fastest run of each batch size that pays off."""
    weights_bytes: int
    """Memory growth from loading the model."""
    arena_bytes: int
    """Further growth from the largest batches of all lanes."""
    peak_bytes: int
    """Largest growth at any moment, including while it was loaded."""
    note: str = ""
    """Why only one layout was tried, if others could have been."""


def prove(folder: Path, options: EngineOptions, scratch: Path | None, *, known: Proof | None = None) -> Proof:
    """Read, load, verify and time the bundle in `folder`. Raises BundleError or EngineError.

    If more than one layout pays off, their common weights are in `scratch` afterwards, packed. Without such a folder,
    or without room in it, only one layout is tried. `known`: an earlier proof of the same content, of which only the
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
    """The layouts that pay off, each tried with a session of its own, one after the other; and the memory growth from
    the first of these sessions: the others reuse memory that it has freed, or the same packed weights."""
    measured: list[Layout] = []
    # The first session maps nothing twice, and resident memory does not change as other processes come and go.
    before, weights = resident_bytes(), 0
    limit = min(options.max_batch, bundle.manifest.max_batch or options.max_batch)
    end = time.monotonic() + _MAX_TRIAL_SECONDS
    for threads, lanes in options.candidates():
        engine = options.open(model, threads, packed=packed)
        weights = weights or max(0, resident_bytes() - before)
        try:
            verify_golden(bundle, engine)
            seconds = time_sizes(bundle, engine, threads=threads, lanes=lanes, max_batch=limit)
        finally:
            engine.close()
        measured.append(Layout(threads=threads, lanes=lanes, seconds=seconds))
        if time.monotonic() > end:
            break
    return worthwhile_layouts(measured), weights


def _arena_bytes(
    bundle: Bundle, model: Path, layouts: Sequence[Layout], options: EngineOptions, *, packed: bool
) -> int:
    """Memory growth from the largest batches of all lanes, in sessions that are open."""
    opened = dict[int, Engine]()
    engines = Engines(bundle, opened)
    try:
        for layout in layouts:
            opened[layout.threads] = options.open(model, layout.threads, packed=packed)
        loaded = _memory_bytes()
        for layout in layouts:
            engines.shrink(layout)
            together(opened[layout.threads], blank(bundle, layout.sizes[-1]), lanes=layout.lanes)()
        return max(0, _memory_bytes() - loaded)
    finally:
        engines.close()


def _memory_bytes() -> int:
    """Memory of this process; what several sessions map counts once, if the system reports that."""
    return pss_bytes() or resident_bytes()


def _reset_peak() -> bool:
    try:
        reset_peak()
    except OSError:  # the system does not report a peak
        return False
    return True
