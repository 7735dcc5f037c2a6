"""The way of an image through the service: admission, decode, queue and batch, ranking. Knows no HTTP."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from service.cores import available_cores
from service.decode import decode
from service.errors import Busy, RequestError
from service.metrics import Metrics
from service.registry import Model, Registry, load_models
from service.scheduler import Output, Scheduler
from service.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified:
    """One image's answer, and how long its own decoding took."""

    output: Output
    decode_ms: float

    def ranked(self, top_k: int) -> list[tuple[int, float]]:
        """The `top_k` most probable (class index, probability), best first."""
        probabilities = self.output.probabilities
        best = np.argsort(-probabilities, kind="stable")[:top_k]
        return [(int(index), float(probabilities[index])) for index in best]


class Classifier:
    """Ready models and what it takes to ask them. Made once an app; loads and proves all models."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.scheduler = Scheduler()
        threads = settings.threads or available_cores()
        self.registry: Registry = load_models(settings, self.scheduler, threads=threads)
        self._decoders = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")
        self._pending = 0
        self.ready = False
        for name, model in self.registry.models.items():
            metrics.model_info.labels(name, model.bundle.version, model.manifest.variant).set(1)

    def start(self) -> None:
        """Take requests; call on the event loop."""
        self.scheduler.start(self.metrics.on_batch)
        self.ready = True

    async def close(self) -> None:
        """Release the threads; call when all requests are answered."""
        self.ready = False
        await self.scheduler.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def admit(self, images: int = 1) -> Iterator[None]:
        """Hold places for `images` while they are worked on. Raises Busy at once if there are none."""
        if self._pending + images > self.settings.max_pending:
            wait = self.scheduler.drain_seconds()
            raise Busy(
                f"{self._pending} images are in work and {self.settings.max_pending} are allowed: "
                "nothing was done for this request, send it again later",
                retry_after_s=max(1, math.ceil(wait)),
            )
        self._pending += images
        self.metrics.pending.set(self._pending)
        try:
            yield
        finally:
            self._pending -= images
            self.metrics.pending.set(self._pending)

    async def in_decoder(self, work: Callable[[], T]) -> T:
        """Do `work` in the decode pool, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)

    async def classify(self, model: Model, images: list[bytes]) -> list[Classified | RequestError]:
        """Answer each image, in order; one that cannot be used gives its error and harms no other."""
        return list(await asyncio.gather(*(self._classify_one(model, image) for image in images)))

    async def _classify_one(self, model: Model, image: bytes) -> Classified | RequestError:
        name, metrics = model.manifest.name, self.metrics
        started = time.perf_counter()
        try:
            pixels = await self.in_decoder(
                partial(decode, image, model.manifest.preprocessing, max_pixels=self.settings.max_pixels)
            )
        except RequestError as error:
            metrics.images.labels(name, type(error).__name__).inc()
            return error
        decode_ms = (time.perf_counter() - started) * 1000
        output = await self.scheduler.submit(model.queue, pixels)
        metrics.stage_seconds.labels(name, "decode").observe(decode_ms / 1000)
        metrics.stage_seconds.labels(name, "queue").observe(output.queue_ms / 1000)
        metrics.stage_seconds.labels(name, "inference").observe(output.inference_ms / 1000)
        metrics.images.labels(name, "ok").inc()
        return Classified(output=output, decode_ms=decode_ms)
