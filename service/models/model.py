"""A model that takes traffic: a proven bundle, its engine, its queue, and what it has done so far."""

import asyncio
import time
from dataclasses import dataclass, field

from service.bundle import Bundle
from service.engine import Engine
from service.manifest import Manifest
from service.scheduling.scheduler import Queue


@dataclass(slots=True)
class Sum:
    """A count and the nanoseconds that went into it."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        """Count one more event, that took `seconds`."""
        self.count += 1
        self.ns += round(seconds * 1e9)


@dataclass(slots=True)
class Statistics:
    """What the statistics extension of the Open Inference Protocol asks for.

    Requests are counted once and in all stages at the same moment: perf_analyzer stops where the counts differ.
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
    """By images in the batch."""

    def succeeded(self, *, total: float, queue: float, decode: float, inference: float, answer: float) -> None:
        """Count a request by its seconds; with several images, those of the slowest."""
        self.success.add(total)
        self.queue.add(queue)
        self.decode.add(decode)
        self.inference.add(inference)
        self.answer.add(answer)

    def failed(self, seconds: float) -> None:
        """Count a request that got an error."""
        self.fail.add(seconds)

    def batch(self, images: int, seconds: float) -> None:
        """Count a batch that was run."""
        self.batches.setdefault(images, Sum()).add(seconds)
        self.images += images
        self.last_inference_ms = time.time_ns() // 1_000_000


class Model:
    """Holds an engine for as long as somebody uses it: a request enters it as a context."""

    def __init__(
        self, bundle: Bundle, engine: Engine, queue: Queue, *, model_bytes: int = 0, arena_bytes: int = 0
    ) -> None:
        self.bundle, self.engine, self.queue = bundle, engine, queue
        self.model_bytes, self.arena_bytes = model_bytes, arena_bytes
        """Growth of resident memory as the model was loaded and warmed up."""
        self.statistics = Statistics()
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @property
    def manifest(self) -> Manifest:
        """What the model is."""
        return self.bundle.manifest

    @property
    def name(self) -> str:
        """The bundle's."""
        return self.bundle.manifest.name

    @property
    def version(self) -> int:
        """The bundle's."""
        return self.bundle.version

    @property
    def top1(self) -> float:
        """On the test split; below zero for random weights."""
        accuracy = self.manifest.accuracy
        return accuracy.top1 if accuracy else -1.0

    def __enter__(self) -> "Model":
        self._users += 1
        self._unused.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if not self._users:
            self._unused.set()

    async def unused(self) -> None:
        """Wait until every request that holds the model is answered."""
        await self._unused.wait()
