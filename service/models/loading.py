"""From a bundle on disk to a model that may take traffic.

    read, digests → memory that it needs → proof in a process of its own → engine here → one golden image → warm-up

Nothing is loaded into this process before another one has loaded it, and whatever fails leaves nothing behind. Each run
here is a job of its own on the engine thread: live traffic waits for one at most.
"""

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog

from service.bundle import Bundle, content_digest, read_bundle
from service.engine import Engine, Tuning, resolve_device
from service.engine_timer import time_runs
from service.errors import BundleError, NotNow
from service.host import memory_left_bytes, resident_bytes
from service.models.model import Model
from service.models.proof import EngineOptions, Proof, blank
from service.models.prover import Prover
from service.models.verify import verify_golden
from service.scheduling.cost import Cost, Load
from service.scheduling.scheduler import Queue, Scheduler

log = structlog.get_logger()

_MEMORY_PER_GRAPH_BYTE = 2.0
"""Memory that a model takes per byte of its graph, where the manifest does not say: the weights once as they are read
and once as they are used."""

_SHORT_SECONDS = 0.02
"""A batch that takes less is run a second time at warm-up, as its first run is not typical."""


class Loader:
    """Loads bundles onto one device, one at a time. `load` blocks; engines run on the engine thread only."""

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
        memory_bytes: int = 0,
        timeout_seconds: float = 300.0,
    ) -> None:
        """`threads`: cores to use; `intra_op_threads`: 0 to choose between one and all of them for each model;
        `memory_bytes`: what this process may take in all, 0 for all that there is; `timeout_seconds`: for one proof.

        Raises EngineError if the device is unavailable.
        """
        self._scheduler, self._load = scheduler, load
        kind, number = resolve_device(device)
        if tuning.tensorrt_cache is not None:
            # The process that proves a bundle has another current folder.
            tuning = replace(tuning, tensorrt_cache=tuning.tensorrt_cache.absolute())
        self._options = EngineOptions(
            device=kind,
            number=number,
            threads=threads,
            intra_op_threads=intra_op_threads,
            max_batch=max_batch,
            tuning=tuning,
        )
        self._memory_bytes = memory_bytes
        self._prover = Prover(self._options, seconds=timeout_seconds)
        self._proofs: dict[tuple[str, int], Proof] = {}
        """The last proof of each version: what has been proven here once is not proven again."""
        self._one = threading.Lock()

    def load(self, folder: Path) -> Model:
        """Load the bundle in `folder`. Raises BundleError or EngineError."""
        with self._one:
            bundle = read_bundle(folder)
            manifest, device = bundle.manifest, self._options.device
            if device not in manifest.devices:
                raise BundleError(f"{folder}: made for {', '.join(manifest.devices)}, not for {device}")
            self._require(folder, *_expected_bytes(bundle))
            proof = self._proof(bundle)
            self._require(folder, proof.peak_bytes, "measured")
            engine, seconds = self._open(bundle, proof)
        log.info(
            "model ready",
            model=manifest.name,
            version=bundle.version,
            device=device,
            threads=proof.threads,
            batch_ms={size: round(taken * 1000, 2) for size, taken in seconds.items()},
            memory_mib=proof.peak_bytes >> 20,
        )
        return Model(
            bundle,
            engine,
            Queue(
                manifest.name,
                engine.run,
                Cost(seconds, self._load),
                version=bundle.version,
                classes=manifest.num_classes,
            ),
            model_bytes=proof.weights_bytes,
            arena_bytes=proof.arena_bytes,
        )

    def memory_left(self) -> int | None:
        """Memory that is left for another model; None where that is unknown and not limited."""
        left = memory_left_bytes()
        if not self._memory_bytes:
            return left
        own = max(0, self._memory_bytes - resident_bytes())
        return own if left is None else min(own, left)

    def rest(self) -> None:
        """Free what proofs need. To be called after the last of some loads."""
        self._prover.rest()

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

    def _proof(self, bundle: Bundle) -> Proof:
        key, digest = (bundle.manifest.name, bundle.version), content_digest(bundle.folder)
        known = self._proofs.pop(key, None)
        if known is not None and known.digest == digest:
            proof = known
        else:
            # A GPU's driver maps more memory than there is.
            limit = self.memory_left() if self._options.device == "cpu" else None
            proof = self._prover.prove(bundle.folder, memory_bytes=limit)
            if proof.digest != digest:
                raise NotNow(f"{bundle.folder}: was changed while it was loaded")
        self._proofs[key] = proof
        return proof

    def _open(self, bundle: Bundle, proof: Proof) -> tuple[Engine, dict[int, float]]:
        """An engine that is warmed up for the batch sizes that pay, and the seconds of each."""
        engine = self._options.engine(bundle, threads=proof.threads)
        on_engine = self._scheduler.on_engine
        try:
            # The rest of them were run by the process that proved it.
            verify_golden(bundle, engine, first=1, run=lambda pixels: on_engine(partial(engine.run, pixels)))
            sizes = sorted(proof.seconds, reverse=True)
            on_engine(partial(engine.shrink, blank(bundle, sizes[0])))
            seconds = {size: self._time(bundle, engine, size) for size in sizes}
        except BaseException:
            self._proofs.pop((bundle.manifest.name, bundle.version), None)
            try:
                on_engine(engine.close)
            except RuntimeError:  # the engine thread has ended
                engine.close()
            raise
        # The faster one: interference only makes a run longer, and the cost model follows it by live timings.
        return engine, {size: min(proof.seconds[size], seconds[size]) for size in reversed(sizes)}

    def _time(self, bundle: Bundle, engine: Engine, size: int) -> float:
        run = partial(engine.run, blank(bundle, size))
        on_engine = self._scheduler.on_engine
        return min(time_runs(run, seconds=_SHORT_SECONDS, max_runs=2, warm_up_runs=0, on_thread=on_engine))


def _expected_bytes(bundle: Bundle) -> tuple[int, str]:
    """Memory that a model will take, and where that is known from."""
    if memory := bundle.manifest.memory:
        return memory.weights_bytes + memory.arena_bytes, "by its manifest"
    size = bundle.model_path.stat().st_size
    return round(size * _MEMORY_PER_GRAPH_BYTE), f"estimated from its graph of {size >> 20} MiB"
