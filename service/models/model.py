"""A model that takes traffic: a verified bundle, its engines, its queue, and its statistics."""

import asyncio
import time
from dataclasses import dataclass, field

import structlog

from service.bundle import Bundle
from service.errors import NotReady
from service.models.engines import Engines
from service.scheduling.scheduler import Queue, Scheduler

log = structlog.get_logger()


@dataclass(slots=True)
class Sum:
    """A number of events and their total nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        """Count one event that took `seconds`."""
        self.count += 1
        self.ns += round(seconds * 1e9)


@dataclass(slots=True)
class Statistics:
    """What the statistics extension of the Open Inference Protocol reports.

    A request is counted once, in all stages at the same moment: perf_analyzer stops if the counts differ.
    """

    last_inference_ms: int = 0
    """Unix time in milliseconds."""
    images: int = 0
    success: Sum = field(default_factory=Sum)
    fail: Sum = field(default_factory=Sum)
    queue: Sum = field(default_factory=Sum)
    decode: Sum = field(default_factory=Sum)
    inference: Sum = field(default_factory=Sum)
    answer: Sum = field(default_factory=Sum)
    """Writing the answer."""
    batches: dict[int, Sum] = field(default_factory=dict)
    """By number of images in the batch."""

    def succeeded(self, *, total: float, queue: float, decode: float, inference: float, answer: float) -> None:
        """Count an answered request with its times in seconds; with several images, those of the slowest."""
        self.success.add(total)
        self.queue.add(queue)
        self.decode.add(decode)
        self.inference.add(inference)
        self.answer.add(answer)

    def batch(self, images: int, seconds: float) -> None:
        """Count a batch that was run."""
        self.batches.setdefault(images, Sum()).add(seconds)
        self.images += images
        self.last_inference_ms = time.time_ns() // 1_000_000


class Model:
    """A model whose engines stay open as long as requests use it: each request enters the model as a context."""

    def __init__(
        self, bundle: Bundle, engines: Engines, queue: Queue, *, model_bytes: int = 0, arena_bytes: int = 0
    ) -> None:
        self.bundle, self.engines, self.queue = bundle, engines, queue
        self.manifest, self.name, self.version = bundle.manifest, bundle.manifest.name, bundle.version
        self.top1 = bundle.manifest.accuracy.top1 if bundle.manifest.accuracy else -1.0
        """Top-1 on the test split; below zero if unknown."""
        self.model_bytes, self.arena_bytes = model_bytes, arena_bytes
        """Growth of resident memory while the model was loaded, and while it was warmed up."""
        self.statistics = Statistics()
        self.consecutive_faults = 0
        """Images that the model has failed on since it last answered one."""
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    def __enter__(self) -> "Model":
        self._users += 1
        self._unused.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if not self._users:
            self._unused.set()

    def trim(self) -> None:
        """Free what the engines' arenas hold beyond the needs of the largest batch. On a lane of the engine."""
        for layout in self.queue.cost.layouts:
            self.engines.shrink(layout)

    async def unused(self) -> None:
        """Wait until every request that holds the model is answered."""
        await self._unused.wait()

    async def retire(self, scheduler: Scheduler) -> None:
        """Answer what was accepted, then leave the scheduler and free the engine's memory.

        An engine that cannot be closed is logged: its memory stays in use, and nothing else waits for it.
        """
        await self.unused()
        scheduler.remove(self.queue)
        try:
            await asyncio.to_thread(scheduler.on_engine, self.engines.close)
        except (NotReady, RuntimeError, OSError) as error:
            log.error("model not closed", model=self.name, version=self.version, reason=str(error))
        else:
            log.info("model retired", model=self.name, version=self.version)
