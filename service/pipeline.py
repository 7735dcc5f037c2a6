"""The way of an image through the service: choice of the model, admission, decode, queue and batch. Knows no HTTP."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from service.errors import RequestError
from service.host import available_cores
from service.images import LARGE_PIXELS, OpenedImage, open_image
from service.metrics import Gauges, Metrics
from service.models.family import Choice, Family, pareto_front
from service.models.loading import Loader
from service.models.model import Model
from service.models.registry import Registry
from service.scheduling.admission import Admission
from service.scheduling.cost import Load
from service.scheduling.decode_pool import Lane
from service.scheduling.request import Priority, RequestState
from service.scheduling.scheduler import Batch, Output, Scheduler
from service.settings import Settings

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSelector:
    """Which model a request asks for: by its name, by a family's, or the default one."""

    model: str | None = None
    version: int | None = None
    min_top1: float = 0.0
    """A family may not go below this accuracy."""


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
        decode_threads = settings.decode_threads or settings.threads or available_cores()
        self.load = Load(decode_threads=decode_threads)
        self.scheduler = Scheduler(self.load)
        self.registry = make_registry(settings, self.scheduler, self.load)
        self.registry.load_all()
        self.admission = Admission(
            self.scheduler,
            self.load,
            max_images_per_request=settings.max_pending_images,
            max_bytes=settings.max_pending_bytes,
            margin=settings.deadline_margin,
        )
        self._small = Lane(decode_threads, "decode")
        self._large = Lane(max(1, decode_threads // 2), "decode-large")
        self.ready = False
        metrics.watch(self._gauges)

    def start(self) -> None:
        """Take requests; call on the event loop."""
        self.scheduler.start(self._on_batch)
        self.ready = True

    async def close(self) -> None:
        """Release the threads; call when all requests are answered."""
        self.ready = False
        await self.scheduler.close()
        self._small.close()
        self._large.close()

    @property
    def takes_traffic(self) -> bool:
        """Whether requests are served: started, not draining, and with a model."""
        return self.ready and bool(self.registry.ready)

    def ticket(self, *, deadline_ms: float | None, priority: Priority, since: float) -> RequestState:
        """For a request that arrived at `since` and wants its answer within `deadline_ms`."""
        wanted = self.settings.default_deadline_ms if deadline_ms is None else deadline_ms
        return RequestState(seconds=min(wanted, self.settings.max_deadline_ms) / 1000, priority=priority, since=since)

    def reject_if_unreachable(self, wish: ModelSelector, ticket: RequestState, *, encoded: bool) -> None:
        """Before its body is read: raise Overloaded if a request could not finish in time whichever model it gets.

        Raises UnknownModel too.
        """
        fastest = pareto_front(self.members(wish))[-1]
        self.admission.require_in_time(ticket, self.admission.predict(fastest.queue, ticket, encoded=encoded))

    def choose(
        self, wish: ModelSelector, ticket: RequestState, *, images: int, encoded: bool = True
    ) -> tuple[Model, Choice | None]:
        """The model that is to answer, and why if a family was asked for. Raises UnknownModel, NoSuitableModel."""
        found = self._family(wish)
        if found is None:
            return self.registry.find(wish.model, wish.version), None
        family, ladder = found
        decode = self.load.decode_seconds if encoded else 0.0
        choice = family.choose(
            pareto_front(ladder),
            predict=lambda model: self.admission.predict(model.queue, ticket, images, encoded=encoded),
            predict_idle=lambda model: decode + model.queue.cost.total(images),
            allowed_seconds=self.admission.allowed_seconds(ticket),
            min_top1=wish.min_top1,
        )
        self.metrics.choices.labels(family.name, choice.model.name, choice.reason).inc()
        return choice.model, choice

    def members(self, wish: ModelSelector) -> list[Model]:
        """The models that a wish may get, the most accurate first. Raises UnknownModel."""
        found = self._family(wish)
        return found[1] if found else [self.registry.find(wish.model, wish.version)]

    async def run_in_decode_pool(self, ticket: RequestState, work: Callable[[], T]) -> T:
        """Do work that takes long in the decode pool. Raises ClientDisconnected or DeadlineExceeded, work undone."""
        return await self._small.run(ticket, work)

    async def classify(
        self, model: Model, ticket: RequestState, images: list[bytes]
    ) -> list[Classified | RequestError]:
        """Answer each image, in order; one that cannot be used gives its error and harms no other."""
        if len(images) == 1:
            return [await self._classify_one(model, ticket, images[0])]
        # All end before a fault is raised: none may work on for a request that has left.
        work = (self._classify_one(model, ticket, image) for image in images)
        answers: list[Classified | RequestError] = []
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            if not isinstance(outcome, Classified | RequestError):
                raise outcome
            answers.append(outcome)
        return answers

    async def infer(self, model: Model, ticket: RequestState, pixels: Pixels) -> list[Output]:
        """Answer uint8 images (n,H,W,3) that need no decoding. Raises what the first of them raises."""
        work = (self._infer_one(model, ticket, image) for image in pixels)
        outputs: list[Output] = []
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            if not isinstance(outcome, Output):
                raise outcome
            outputs.append(outcome)
        return outputs

    def finished(
        self,
        model: Model,
        *,
        started: float,
        read_ms: float,
        decode_ms: float,
        outputs: list[Output],
        answered_at: float,
    ) -> dict[str, float]:
        """Count a request that was answered, and give its timings in ms; with several images, of the slowest.

        `started` and `answered_at`, when the last output was there, are on `time.perf_counter`'s clock.
        """
        ended = time.perf_counter()
        queue_ms = max(output.queue_ms for output in outputs)
        inference_ms = max(output.inference_ms for output in outputs)
        model.statistics.succeeded(
            total=ended - started,
            queue=queue_ms / 1000,
            decode=decode_ms / 1000,
            inference=inference_ms / 1000,
            answer=ended - answered_at,
        )
        self.metrics.stage(model.name, "total").observe(ended - started)
        return {
            "read": round(read_ms, 3),
            "decode": round(decode_ms, 3),
            "queue": round(queue_ms, 3),
            "inference": round(inference_ms, 3),
            "total": round((ended - started) * 1000, 3),
        }

    def _family(self, wish: ModelSelector) -> tuple[Family, list[Model]] | None:
        return self.registry.family(wish.model) if wish.model and wish.version is None else None

    async def _classify_one(self, model: Model, ticket: RequestState, image: bytes) -> Classified | RequestError:
        try:
            pixels, seconds = await self._decode(model, ticket, image)
        except RequestError as error:
            ticket.answered()
            self.metrics.images.labels(model.name, type(error).__name__).inc()
            return error
        finally:
            ticket.decoded()
        self.metrics.stage(model.name, "decode").observe(seconds)
        try:
            output = await self._infer_one(model, ticket, pixels)
        except RequestError as error:
            self.metrics.images.labels(model.name, type(error).__name__).inc()
            return error
        return Classified(output=output, decode_ms=seconds * 1000)

    async def _infer_one(self, model: Model, ticket: RequestState, pixels: Pixels) -> Output:
        output = await self.scheduler.submit(model.queue, pixels, ticket)
        metrics = self.metrics
        metrics.stage(model.name, "queue").observe(output.queue_ms / 1000)
        metrics.stage(model.name, "inference").observe(output.inference_ms / 1000)
        metrics.answered(model.name)
        return output

    async def _decode(self, model: Model, ticket: RequestState, image: bytes) -> tuple[Pixels, float]:
        preprocessing, max_pixels = model.manifest.preprocessing, self.settings.max_pixels

        def small() -> tuple[Pixels | OpenedImage, float]:
            started = time.perf_counter()
            opened = open_image(image, preprocessing, max_pixels=max_pixels)
            result = opened if opened.pixels > LARGE_PIXELS else opened.render()
            return result, time.perf_counter() - started

        coming, batch = model.queue.coming, ticket.key.batch
        coming[batch] += 1
        try:
            result, seconds = await self._small.run(ticket, small)
        finally:
            coming[batch] -= 1
            self.scheduler.wake()
        if isinstance(result, np.ndarray):
            # Large ones have their own lane: they say nothing of how long the next small one will take.
            self.load.decoded(seconds)
            return result, seconds
        opened = result

        def large() -> tuple[Pixels, float]:
            started = time.perf_counter()
            return opened.render(), time.perf_counter() - started

        pixels, more = await self._large.run(ticket, large)
        return pixels, seconds + more

    def _gauges(self) -> Gauges:
        return Gauges(
            pending_images=self.admission.images,
            pending_bytes=self.admission.bytes,
            predicted_drain_seconds=self.admission.graceful_timeout_seconds(),
            slowdown=self.load.slowdown,
            models=[model.gauges() for model in self.registry.ready],
        )

    def _on_batch(self, batch: Batch) -> None:
        name = batch.queue.name
        self.metrics.on_batch(name, batch.images, batch.size, failed=batch.failed)
        for model in self.registry.ready:
            if model.queue is batch.queue and not batch.failed:
                model.statistics.batch(batch.images, batch.seconds)


def make_registry(settings: Settings, scheduler: Scheduler, load: Load) -> Registry:
    """An empty registry as the settings ask for. Raises EngineError if the device is unavailable."""
    loader = Loader(
        scheduler,
        load,
        device=settings.device,
        threads=settings.threads or available_cores(),
        intra_op_threads=settings.intra_op_threads,
        max_batch=settings.max_batch,
        tuning=settings.tuning(),
    )
    return Registry(
        loader,
        scheduler,
        repository=settings.repository,
        names=settings.models,
        default_model=settings.default_model,
        versions_to_serve=settings.versions_to_serve,
        step_up_headroom=settings.step_up_headroom,
    )
