"""From a bundle on disk to a model that may take traffic.

    read, digests → memory that it needs → proof in a process of its own → engine here → one golden image → warm-up

Nothing is loaded into this process before another one has loaded it, and a failure leaves nothing behind. Each run here
is a separate job on a lane of the engine: live traffic waits for one at most.

Where several layouts of a model pay off, their sessions share its weights: they map a file that only this process knows
and that is removed once they are open, see `service.engine.pack`.
"""

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog

from service.bundle import Bundle, content_digest, read_bundle
from service.engine import Engine, packed_in
from service.engine_timer import time_runs
from service.errors import BundleError, NotNow
from service.host import memory_left_bytes, resident_bytes
from service.models.engines import Engines, blank
from service.models.model import Model
from service.models.packed import shared
from service.models.proof import EngineOptions, Proof
from service.models.prover import Prover
from service.models.scratch import scratch_folder
from service.models.verify import verify_golden
from service.scheduling.cost import Cost, Load
from service.scheduling.layouts import Layout
from service.scheduling.outputs import Outputs, Pixels
from service.scheduling.scheduler import Queue, Scheduler

log = structlog.get_logger()

_MEMORY_PER_GRAPH_BYTE = 2.0
"""Memory that a model takes per byte of its graph, if the manifest does not give it: the weights once as read and once
as used."""

_SHORT_SECONDS = 0.02
"""A batch that takes less is run a second time at warm-up, as its first run is not typical."""


class Loader:
    """Loads bundles onto one device, one at a time. `load` blocks; engines run on the engine's lanes only."""

    def __init__(
        self,
        scheduler: Scheduler,
        load: Load,
        options: EngineOptions,
        *,
        memory_bytes: int = 0,
        timeout_seconds: float = 300.0,
        packed: Path | None = None,
    ) -> None:
        """`memory_bytes`: what this process may take in total, 0 for all that there is; `timeout_seconds`: time limit
        of a proof; `packed`: a folder in which several processes share packed weights."""
        self._scheduler, self._load, self._options = scheduler, load, options
        self._memory_bytes, self._packed = memory_bytes, packed
        self._prover = Prover(self._options, seconds=timeout_seconds)
        self._proofs: dict[tuple[str, int], Proof] = {}
        """The last proof of each version: what has been proven here once is not proven again."""
        self._one = threading.Lock()
        self._beside_traffic = False
        """True after the first loads: before that, clients wait only for the service to start, not for answers."""

    def load(self, folder: Path) -> Model:
        """Load the bundle in `folder`. Raises BundleError or EngineError."""
        with self._one:
            bundle = read_bundle(folder)
            manifest, device = bundle.manifest, self._options.device
            if device not in manifest.devices:
                raise BundleError(f"{folder}: made for {', '.join(manifest.devices)}, not for {device}")
            self._require(folder, *_expected_bytes(bundle))
            with scratch_folder() as scratch:
                proof = self._proof(bundle, scratch)
                self._require(folder, proof.peak_bytes, "measured")
                engines, layouts = self._open(bundle, proof, scratch)
        if proof.note:
            log.warning("one layout only", model=manifest.name, version=bundle.version, reason=proof.note)
        log.info(
            "model ready",
            model=manifest.name,
            version=bundle.version,
            device=device,
            layouts=[f"{layout.lanes}x{layout.threads}" for layout in layouts],
            batch_ms={size: round(taken * 1000, 2) for size, taken in layouts[0].seconds.items()},
            memory_mib=(proof.weights_bytes + proof.arena_bytes) >> 20,
        )
        return Model(
            bundle,
            engines,
            Queue(
                manifest.name,
                engines.run,
                Cost(layouts, self._load),
                version=bundle.version,
                classes=manifest.num_classes,
                # A GPU's buffers, and graphs captured with them, belong to the thread of a lane.
                any_thread=device == "cpu",
            ),
            model_bytes=proof.weights_bytes,
            arena_bytes=proof.arena_bytes,
        )

    @property
    def _job_cores(self) -> int:
        """Cores that a run for a model being loaded takes from other models' batches: on a CPU none, whatever its
        threads, because no client waits for it. A GPU's buffers belong to the thread of a lane."""
        return 0 if self._options.device == "cpu" else 1

    def memory_left(self) -> int | None:
        """Memory that is left for another model; None where that is unknown and not limited."""
        left = memory_left_bytes()
        if not self._memory_bytes:
            return left
        own = max(0, self._memory_bytes - resident_bytes())
        return own if left is None else min(own, left)

    def rest(self) -> None:
        """Free what proofs hold. To be called after the last of a series of loads."""
        self._prover.rest()
        self._beside_traffic = True

    def close(self) -> None:
        """End a proof that is running, and allow no other. From any thread."""
        self._prover.close()

    def _require(self, folder: Path, needed: int, how: str) -> None:
        """Raise NotNow if the memory that is needed is not left."""
        left = self.memory_left()
        if left is not None and needed > left:
            raise NotNow(
                f"{folder}: needs {needed >> 20} MiB of memory ({how}), but {left >> 20} MiB are left",
                needed_bytes=needed,
            )

    def _proof(self, bundle: Bundle, scratch: Path | None) -> Proof:
        key, digest = (bundle.manifest.name, bundle.version), content_digest(bundle.folder)
        known = self._proofs.pop(key, None)
        if known is not None and known.digest != digest:
            known = None
        proof = known
        if proof is None or len(proof.layouts) > 1:
            # A GPU's driver maps more memory than there is.
            limit = self.memory_left() if self._options.device == "cpu" else None
            proof = self._prover.prove(
                bundle.folder, scratch, memory_bytes=limit, known=known, background=self._beside_traffic
            )
            if proof.digest != digest:
                raise NotNow(f"{bundle.folder}: was changed while it was loaded")
        if not proof.note:
            # Otherwise there may be more room next time.
            self._proofs[key] = proof
        return proof

    def _open(self, bundle: Bundle, proof: Proof, scratch: Path | None) -> tuple[Engines, tuple[Layout, ...]]:
        """Engines that are warmed up, and their layouts as timed here."""
        packed = packed_in(scratch) if scratch and len(proof.layouts) > 1 else None
        if packed and self._packed:
            packed = shared(packed, self._packed)
        layouts = proof.layouts if packed else proof.layouts[:1]
        on_engine, opened = self._scheduler.on_engine, dict[int, Engine]()
        engines = Engines(bundle, opened)
        try:
            for layout in layouts:
                opened[layout.threads] = self._options.open(
                    packed or bundle.model_path, layout.threads, packed=packed is not None
                )
                self._warm_up(bundle, engines, layout)
            return engines, tuple(self._timed(bundle, engines, layout) for layout in layouts)
        except BaseException:
            self._proofs.pop((bundle.manifest.name, bundle.version), None)
            try:
                on_engine(engines.close)
            except RuntimeError:  # the engine has ended
                engines.close()
            raise

    def _warm_up(self, bundle: Bundle, engines: Engines, layout: Layout) -> None:
        on_engine = partial(self._scheduler.on_engine, cores=self._job_cores)

        def run(pixels: Pixels) -> Outputs:
            return on_engine(partial(engines.run, pixels, layout.threads))

        # The process that proved it has run the other golden images.
        verify_golden(bundle, engines.engine(layout.threads), first=1, run=run)
        on_engine(partial(engines.shrink, layout))

    def _timed(self, bundle: Bundle, engines: Engines, layout: Layout) -> Layout:
        """Warm up all batch sizes of a layout. The faster timing counts: interference only makes a run longer, and the
        cost model adapts to it."""
        seconds = dict(layout.seconds)
        for size in layout.sizes:
            run = partial(engines.run, blank(bundle, size), layout.threads)
            on_engine = partial(self._scheduler.on_engine, cores=self._job_cores)
            runs = time_runs(run, seconds=_SHORT_SECONDS, max_runs=2, warm_up_runs=0, on_thread=on_engine)
            if layout.lanes == 1:
                # Otherwise the lanes would have to be timed together.
                seconds[size] = min(seconds[size], *runs)
        return replace(layout, seconds=seconds)


def _expected_bytes(bundle: Bundle) -> tuple[int, str]:
    """Memory that a model is expected to take, and the source of that number."""
    if memory := bundle.manifest.memory:
        return memory.weights_bytes + memory.arena_bytes, "by its manifest"
    size = bundle.model_path.stat().st_size
    return round(size * _MEMORY_PER_GRAPH_BYTE), f"estimated from its graph of {size >> 20} MiB"
