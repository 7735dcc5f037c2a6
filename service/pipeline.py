"""A request's path through the service: select, admit, read, decode, batch, rank, account. Independent of HTTP."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from service.errors import ClientDisconnected, DeadlineExceeded, ModelFault, NotReady, Overloaded, RequestError
from service.image_work import least_works
from service.limits import Limits
from service.metrics import Metrics
from service.models.arena import ArenaTrimmer
from service.models.family import Choice, Family, pareto_front, require_top1
from service.models.faults import Faults
from service.models.model import Model
from service.models.registry import Registry
from service.rollouts.canary import CanaryRequests
from service.rollouts.rollouts import Part, Rollouts
from service.scheduling.admission import Admission, Place
from service.scheduling.cost import Load
from service.scheduling.decode_pool import DecodePool
from service.scheduling.loop_lag import LoopLag
from service.scheduling.queue import Entry
from service.scheduling.request import Priority, RequestState
from service.scheduling.room import Room
from service.scheduling.scheduler import Batch, Output, Scheduler
from service.scheduling.shared_image import SharedImage

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]

_FEW_CLASSES = 200
"""So few are sorted as fast without NumPy, which releases the GIL while it sorts: under load, reacquiring it costs more
than the sort."""


class RequestOptions(BaseModel, frozen=True, use_attribute_docstrings=True):
    """What a request asks for, besides its images. The descriptions are shown in /docs."""

    model: Annotated[str | None, Field(max_length=100)] = None
    """Name of a model or of a family; of a family, the most accurate model that can meet the deadline answers. Without
    a name, the default model answers."""
    version: Annotated[int | None, Field(ge=1)] = None
    """Version of the model; the newest by default."""
    min_top1: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Minimum top-1 accuracy of the model that answers: 422 if the named model, the default model, or every model of
    the family is below it."""
    deadline_ms: Annotated[float | None, Field(gt=0, le=1e9)] = None
    """Answer within this many milliseconds of the request's arrival, or not at all."""
    priority: Priority = "interactive"
    """While `interactive` work waits, `batch` work gets only `batch_share` of the turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the body of a request holds."""

    images: Sequence[bytes] | Pixels = ()
    """Encoded images, or uint8 (n,H,W,3) that need no decoding."""
    shared: SharedImage | None = None
    """Instead of these, one image that other models get too."""
    seconds: float | None = None
    """An earlier deadline, counted from the request's arrival."""
    priority: Priority | None = None
    options: RequestOptions | None = None
    """What the request asks for if its body says more about that than its head; replaces the head's options."""

    @property
    def nbytes(self) -> int:
        """Bytes of all images, except those of a shared one: whoever shares it accounts for them."""
        return self.images.nbytes if isinstance(self.images, np.ndarray) else sum(map(len, self.images))

    @property
    def count(self) -> int:
        """Number of images."""
        return 1 if self.shared else len(self.images)


@dataclass(slots=True, kw_only=True)
class Answer:
    """The outputs for every image of a request, in order, from one model."""

    model: Model
    choice: Choice | None
    """Why this model, if the request named a family or belongs to a canary's share."""
    images: list[Output | RequestError]
    """An image that cannot be used has an error instead."""
    timings_ms: dict[str, float] = field(default_factory=dict)
    """`read`, `decode`, `queue`, `inference` and `total`, once the answer is written; the longest of all images."""

    @property
    def outputs(self) -> list[Output]:
        """The images that have no error."""
        return [image for image in self.images if isinstance(image, Output)]


def ranked(values: npt.NDArray[np.float32], count: int) -> list[tuple[int, float]]:
    """The `count` highest of the values of all classes, (num_classes,), as (class index, value), best first."""
    if len(values) <= _FEW_CLASSES:
        few: list[float] = values.tolist()
        return [(index, few[index]) for index in sorted(range(len(few)), key=few.__getitem__, reverse=True)[:count]]
    best = np.argsort(-values, kind="stable")[:count]
    return [(int(index), float(values[index])) for index in best]


def _fits(inputs: Inputs, model: Model) -> bool:
    """Whether a model can take inputs that were prepared for the model found when the request arrived."""
    if inputs.shared:
        return inputs.shared.preprocessing.geometry == model.manifest.preprocessing.geometry
    return not isinstance(inputs.images, np.ndarray) or inputs.images.shape[1:] == model.manifest.input.shape[1:]


class Pipeline:
    """Ready models and what it takes to answer with them. One per application."""

    def __init__(
        self,
        registry: Registry,
        scheduler: Scheduler,
        load: Load,
        *,
        limits: Limits,
        metrics: Metrics,
        room: Room | None = None,
    ) -> None:
        self.registry, self.scheduler, self.load = registry, scheduler, load
        self.limits, self.metrics = limits, metrics
        self.decoders = DecodePool(scheduler, load, rules=limits.image_rules(), batch_share=limits.batch_share)
        self.lag = LoopLag()
        self.admission = Admission(
            scheduler,
            load,
            room or Room(**limits.of_room()),
            margin=limits.deadline_margin,
            batch_share=limits.batch_share,
            lag=self.lag,
        )
        self.faults = Faults(registry, metrics, max_consecutive=limits.max_consecutive_faults, clock=load.clock)
        self._trimmer = ArenaTrimmer(
            registry,
            scheduler,
            slack_bytes=limits.trim_memory_bytes,
            transient=lambda: self.decoders.held_bytes + self.admission.bytes,
        )
        self.rollouts: Rollouts | None = None
        """Candidates that share the traffic of other models, if there are any."""
        self._canaries = CanaryRequests(registry, self.admission, self.decoders)
        self.ready = False

    def start(self) -> None:
        """Take requests; call on the event loop."""
        self.scheduler.start(self._on_batch)
        self._trimmer.start()
        self.lag.start()
        self.ready = True

    async def close(self) -> None:
        """End the threads; call when all requests are answered."""
        self.ready = False
        self._trimmer.stop()
        self.lag.stop()
        await self.scheduler.close()
        self.decoders.close()

    def require_alive(self) -> None:
        """Raise NotReady if only a restart may help: the engine hangs."""
        self.scheduler.require_engine()

    def require_ready(self) -> None:
        """Raise NotReady unless requests are served: started, not draining, with a model and an engine that works."""
        if not (self.ready and self.registry.ready):
            raise NotReady("the service is starting or draining, or has no model: retry")
        self.scheduler.require_engine()

    async def answer(
        self,
        options: RequestOptions,
        *,
        arrived_at: float,
        read: Callable[[Place], Awaitable[Inputs]],
        write: Callable[[Answer], T],
        watching: Callable[[Callable[[], None]], AbstractContextManager[None]],
        encoded_bytes: int | None = 0,
        partial: bool = False,
    ) -> tuple[T, Answer]:
        """Answer a request whose head arrived at `arrived_at`, on `time.perf_counter`'s clock.

        `read` reads the body once the head is admitted, and accounts for its bytes with the place that it gets; `write`
        writes the answer; `watching` takes a callback and returns a context manager, entered after `read`: while it is
        active, the callback is called when the client leaves. `encoded_bytes`: the least number of bytes of images to
        decode, as far as the head tells; None if there may be none to decode. `partial`: the request fails only if
        every image has an error.

        Returns what `write` returned, and the answer. Raises a RequestError, that of the first failed image if images
        failed. The event loop's clock enforces the deadline: DeadlineExceeded is raised when it passes, whatever hangs.
        """
        state = RequestState(seconds=self.seconds(options), priority=options.priority, arrived_at=arrived_at)
        part: Part | None = None
        afterwards: tuple[Part, Model, list[Output | RequestError]] | tuple[()] = ()
        try:
            self.scheduler.require_engine()
            fastest = pareto_front(self.registry.candidates(options.model, options.version)[1])[-1]
            least = () if encoded_bytes is None else least_works(encoded_bytes)
            with state, self.admission.admit(state, fastest.queue, decoding=least) as place:
                inputs = await read(place)
                read_seconds = time.perf_counter() - arrived_at
                # Unpacked, the images may be much larger than the body was.
                place.hold_bytes(max(0, inputs.nbytes - place.bytes))
                if inputs.options:
                    options = inputs.options
                    state.replace(seconds=self.seconds(options), priority=options.priority)
                state.amend(seconds=inputs.seconds, priority=inputs.priority)
                if self.rollouts and not inputs.shared:
                    name = options.model or self.registry.default
                    part = self.rollouts.part_of(name, options.version, inputs.images)
                answer, accepted_at = await self._serve(options, state, inputs, place, part, watching)
                model, images = answer.model, answer.images
                inferred_at = time.perf_counter()
                errors = [image for image in images if isinstance(image, RequestError)]
                if errors and not (partial and answer.outputs):
                    model.statistics.fail.add(inferred_at - arrived_at)
                    raise errors[0]
                written = write(answer)
                self._account(answer, arrived_at=arrived_at, read_seconds=read_seconds, inferred_at=inferred_at)
                if self.rollouts and part:
                    self.rollouts.answered(part, images, time.perf_counter() - arrived_at)
                    afterwards = part, model, images
                self.metrics.predicted_ratio.observe(
                    place.predicted_seconds / max(1e-6, time.perf_counter() - accepted_at)
                )
                return written, answer
        except RequestError as error:
            self.count_rejection(error)
            if part:
                part.failed(error)
            raise
        finally:
            if self.rollouts:
                # The answer is written before the event loop's next turn.
                asyncio.get_running_loop().call_soon(self.rollouts.afterwards, *afterwards)

    async def _serve(
        self,
        options: RequestOptions,
        state: RequestState,
        inputs: Inputs,
        place: Place,
        part: Part | None,
        watching: Callable[[Callable[[], None]], AbstractContextManager[None]],
    ) -> tuple[Answer, float]:
        """The answer of the selected model, or of a candidate, and when the request was accepted."""

        async def infer(model: Model, decoding: Sequence[int]) -> list[Output | RequestError]:
            with model, watching(state.leave):
                return await self._infer(model, state, inputs, decoding, part.entries if part else None)

        if part and part.canary:
            accepted_at = time.perf_counter()
            found = await self._canaries.answer(
                part,
                part.canary,
                place,
                min_top1=options.min_top1,
                fits=lambda model: _fits(inputs, model),
                infer=infer,
            )
            if found:
                model, choice, images = found
                if self.registry.is_family(choice["family"]):
                    self.metrics.choices(choice["family"], model.name, choice["reason"]).inc()
                return Answer(model=model, choice=choice, images=images), accepted_at
        model, why, decoding = self._select(options, state, inputs)
        self.admission.accept(place, model.queue, inputs.count, decoding=decoding)
        accepted_at = time.perf_counter()
        return Answer(model=model, choice=why, images=await infer(model, decoding)), accepted_at

    def count_rejection(self, error: RequestError) -> None:
        """Count a request that was refused, or ended before its answer."""
        if isinstance(error, Overloaded | DeadlineExceeded | ClientDisconnected | NotReady):
            self.metrics.rejections(error.reason if isinstance(error, Overloaded) else error.code).inc()

    def seconds(self, options: RequestOptions) -> float:
        """Seconds from its arrival within which a request must be answered."""
        limit_ms = self.limits.default_deadline_ms if options.deadline_ms is None else options.deadline_ms
        return min(limit_ms, self.limits.max_deadline_ms) / 1000

    def _select(
        self, options: RequestOptions, state: RequestState, inputs: Inputs
    ) -> tuple[Model, Choice | None, list[int]]:
        """The model that answers, the reason if a family was asked for, and the work of decoding each image.

        Raises UnknownModel or NoSuitableModel.
        """
        family, members = self.registry.candidates(options.model, options.version)
        model, choice = members[0], None
        decoding: list[int] = []
        if inputs.shared:
            decoding = inputs.shared.decoding
        elif not isinstance(inputs.images, np.ndarray):
            # By the pixels that the most accurate member needs: all members take the same.
            decoding = self.decoders.work_of(inputs.images, model.manifest.preprocessing)
        if family:
            model, choice = self.decide(
                family, members, state, inputs.count, decoding=decoding, min_top1=options.min_top1
            )
            family.follow(model)
            self.metrics.choices(family.name, model.name, choice["reason"]).inc()
        else:
            require_top1(model, options.min_top1)
        if not _fits(inputs, model):
            raise NotReady("the model was replaced by one of another image size in the meantime: retry")
        return model, choice, decoding

    def decide(
        self,
        family: Family,
        members: Sequence[Model],
        state: RequestState,
        count: int,
        *,
        decoding: Sequence[int],
        min_top1: float = 0.0,
    ) -> tuple[Model, Choice]:
        """Which of a family's members a request of `count` images gets now, and why. Raises NoSuitableModel.

        Without side effects: a request that takes the model makes its family `follow` it.
        """
        return family.decide(
            pareto_front(members),
            predict=lambda model: self.admission.predict(model.queue, state, count, decoding=decoding),
            predict_idle=lambda model: self.admission.idle_seconds(model.queue, count, decoding=decoding),
            allowed_seconds=self.admission.allowed_seconds(state),
            min_top1=min_top1,
            refusing=self.admission.refusing,
        )

    async def _infer(
        self,
        model: Model,
        state: RequestState,
        inputs: Inputs,
        decoding: Sequence[int],
        entries: list[Entry] | None = None,
    ) -> list[Output | RequestError]:
        """The outcome for each image; their queue entries, which hold the pixels, are added to `entries`."""
        images = [inputs.shared] if inputs.shared else inputs.images
        works = decoding or [0] * len(images)
        if len(images) == 1:
            return [await self._infer_one(model, state, images[0], works[0], entries)]
        # All end before an error is raised: none may go on working for a request that is already answered.
        work = (self._infer_one(model, state, image, work, entries) for image, work in zip(images, works, strict=True))
        outcomes: list[Output | RequestError] = []
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            if not isinstance(outcome, Output | RequestError):
                raise outcome
            outcomes.append(outcome)
        return outcomes

    async def _infer_one(
        self,
        model: Model,
        state: RequestState,
        image: bytes | Pixels | SharedImage,
        work: int,
        entries: list[Entry] | None = None,
    ) -> Output | RequestError:
        metrics, name, entry = self.metrics, model.name, self.scheduler.entry(state)
        if entries is not None:
            entries.append(entry)
        try:
            if isinstance(image, bytes):
                with self.decoders.decoding(image, model.manifest.preprocessing, model.queue, entry, work):
                    output = await self._outcome(model, entry)
            else:
                if isinstance(image, SharedImage):
                    image = await image.pixels(model.queue, entry, work)
                self.scheduler.offer(model.queue, entry, image)
                output = await self._outcome(model, entry)
        except RequestError as error:
            metrics.images(name, error.code).inc()
            # The traceback would keep the image alive until the garbage collector runs.
            return error.with_traceback(None)
        finally:
            if work and entry.pixels is not None:
                metrics.stage_seconds(name, "decode").observe(entry.decode_seconds)
        output.decode_ms = entry.decode_seconds * 1000
        metrics.stage_seconds(name, "queue").observe(output.queue_ms / 1000)
        metrics.stage_seconds(name, "inference").observe(output.inference_ms / 1000)
        metrics.images(name, "ok").inc()
        return output

    async def _outcome(self, model: Model, entry: Entry) -> Output:
        try:
            return await self.scheduler.outcome(model.queue, entry)
        except RequestError:
            raise
        except Exception as error:
            if entry.pixels is None:
                # The error is not the model's.
                raise
            # Without the engine's own message, which is for the authors of the model: the log has it.
            reason = f"{model.queue.title} failed on this image, and the service's log says why: use another model"
            raise ModelFault(reason, kind="exception") from error

    def _account(self, answer: Answer, *, arrived_at: float, read_seconds: float, inferred_at: float) -> None:
        """Count a request that was answered, and note its timings."""
        outputs, now = answer.outputs, time.perf_counter()
        decode_ms = max(output.decode_ms for output in outputs)
        queue_ms = max(output.queue_ms for output in outputs)
        inference_ms = max(output.inference_ms for output in outputs)
        total = now - arrived_at
        answer.model.statistics.succeeded(
            total=total,
            queue=queue_ms / 1000,
            decode=decode_ms / 1000,
            inference=inference_ms / 1000,
            answer=now - inferred_at,
        )
        self.metrics.stage_seconds(answer.model.name, "total").observe(total)
        answer.timings_ms = {
            "read": round(read_seconds * 1000, 3),
            "decode": round(decode_ms, 3),
            "queue": round(queue_ms, 3),
            "inference": round(inference_ms, 3),
            "total": round(total * 1000, 3),
        }

    def _on_batch(self, batch: Batch) -> None:
        metrics, name = self.metrics, batch.queue.name
        model = next((model for model in self.registry.ready if model.queue is batch.queue), None)
        if batch.failed or batch.faults or (model and model.consecutive_faults):
            self.faults.record(batch, model)
        if batch.failed:
            return
        metrics.batch_size(name).observe(batch.images)
        metrics.rows(name, "image").inc(batch.images)
        metrics.rows(name, "padding").inc(batch.size - batch.images)
        if model:
            model.statistics.batch(batch.images, batch.seconds)
