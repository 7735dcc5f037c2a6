"""One image sent to several models: decoded once for all that take the same pixels, each answer given once it is ready.

Every model's part is a request to the pipeline, which admits, schedules and counts it like any other. This module holds
what these requests share: the body, the decoding, the client, and the deadline.
"""

import asyncio
import io
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from PIL import Image
from typing_extensions import TypedDict

from service.errors import InvalidParameter, NotReady, RequestError
from service.image_work import least_works
from service.models.model import Model
from service.models.registry import Registry
from service.pipeline import Answer, Inputs, Pipeline, RequestOptions
from service.scheduling.admission import Place
from service.scheduling.request import RequestState
from service.scheduling.scheduler import Pixels
from service.scheduling.shared_image import SharedImage

T = TypeVar("T")

MAX_MODELS = 16
"""Each means one more image for the engine, and one more row for the reader."""

_SMALL_BYTES = 32 * 32 * 3
"""Size of pixels that are encoded as PNG in 0.1 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What some of the models see."""

    models: list[str]
    width: int
    height: int
    png: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered(Generic[T]):
    """A model's answer, and what `write` made of it."""

    answer: Answer
    written: T


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A model that cannot answer. The others go on."""

    model: str
    error: RequestError


class Agreement(TypedDict):
    """How many other models with the same labels agree on the top-1 of the most accurate model that has answered."""

    model: str
    """The most accurate one."""
    of: int
    agree: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """No more events follow."""

    agreement: Agreement | None
    """None if no model has answered."""


Event = Picture | Answered[T] | Failed | Ended


def models_to_compare(registry: Registry, names: Sequence[str]) -> list[Model]:
    """The models with these names, where a family's name stands for all its members; without names, all that are ready.

    Without names there are at most MAX_MODELS, the most accurate ones. Raises UnknownModel, NotReady, or
    InvalidParameter for too many models or one that is named twice.
    """
    if not names:
        newest = {model.name: model for model in registry.ready}
        if not newest:
            raise NotReady("no model is loaded: load one, then retry")
        return sorted(newest.values(), key=lambda model: -model.top1)[:MAX_MODELS]
    found: dict[str, Model] = {}
    for name in names:
        if not name:
            raise InvalidParameter("models: a name is empty: write names with commas between them, as in models=a,b")
        for model in registry.candidates(name)[1]:
            if model.name in found:
                by = "" if name == model.name else f", once by its family {name!r}"
                raise InvalidParameter(f"models: {model.name!r} is named twice{by}: name it once")
            found[model.name] = model
    if len(found) > MAX_MODELS:
        raise InvalidParameter(f"models: {len(found)} models are named; a comparison takes at most {MAX_MODELS}")
    return list(found.values())


async def compare(
    pipeline: Pipeline,
    models: Sequence[Model],
    options: RequestOptions,
    *,
    arrived_at: float,
    read: Callable[[Place], Awaitable[bytes]],
    write: Callable[[Answer], T],
    watching: Callable[[Callable[[], None]], AbstractContextManager[None]],
    encoded_bytes: int,
) -> AsyncGenerator[Event[T], None]:
    """The events as they happen: a picture before the answers to it, and the end.

    The arguments are those of `Pipeline.answer`, except that `read` gives one encoded image; of `options`, only the
    deadline and the priority count. Close the generator: that ends all work still in progress. Raises a RequestError in
    place of the first event if no model can answer.
    """
    comparison = _Comparison(pipeline, models, options, arrived_at=arrived_at, write=write)
    running = asyncio.create_task(comparison.run(read, watching, encoded_bytes))
    running.add_done_callback(lambda _: comparison.events.put_nowait(None))
    try:
        while (event := await comparison.events.get()) is not None:
            yield event
        await running
        yield Ended(agreement=comparison.agreement())
    finally:
        running.cancel()
        await asyncio.wait([running])


class _Comparison(Generic[T]):
    """The part that does not wait for a slow client: its few events are queued, and what they took is free again."""

    def __init__(
        self,
        pipeline: Pipeline,
        models: Sequence[Model],
        options: RequestOptions,
        *,
        arrived_at: float,
        write: Callable[[Answer], T],
    ) -> None:
        self._pipeline, self._models, self._options = pipeline, models, options
        self._arrived_at, self._write = arrived_at, write
        self.events: asyncio.Queue[Event[T] | None] = asyncio.Queue()
        self._failed: list[Failed] = []
        """Held back until something succeeds: if nothing does, there is one error, and no events."""
        self._succeeded = False
        self._top1: list[tuple[Model, int]] = []
        self._state = RequestState(seconds=pipeline.seconds(options), priority=options.priority, arrived_at=arrived_at)
        self._leaving: set[Callable[[], None]] = {self._state.leave}

    async def run(
        self,
        read: Callable[[Place], Awaitable[bytes]],
        watching: Callable[[Callable[[], None]], AbstractContextManager[None]],
        encoded_bytes: int,
    ) -> None:
        """Fill `events`. Raises the first model's RequestError if none can answer."""
        pipeline, state = self._pipeline, self._state
        fastest = min(self._models, key=lambda model: model.queue.cost.per_image())
        try:
            pipeline.scheduler.require_engine()
            admitted = pipeline.admission.admit(state, fastest.queue, decoding=least_works(encoded_bytes))
            with state, admitted as place:
                data = await read(place)
                place.hold_bytes(max(0, len(data) - place.bytes))
                with watching(self._leave):
                    await self._ask_all(data)
        except RequestError as error:
            pipeline.count_rejection(error)
            raise
        if not self._succeeded:
            raise self._failed[0].error

    def agreement(self) -> Agreement | None:
        """How far the models that have answered agree with the most accurate of them."""
        if not self._top1:
            return None
        best, index = max(self._top1, key=lambda pair: pair[0].top1)
        others = [
            other == index
            for model, other in self._top1
            if model is not best and model.bundle.labels == best.bundle.labels
        ]
        return Agreement(model=best.name, of=len(others), agree=sum(others))

    async def _ask_all(self, data: bytes) -> None:
        alike: dict[tuple[int, int, str], list[Model]] = {}
        for model in self._models:
            alike.setdefault(model.manifest.preprocessing.geometry, []).append(model)
        async with asyncio.TaskGroup() as group:
            for models in alike.values():
                group.create_task(self._ask_group(data, models))

    async def _ask_group(self, data: bytes, models: list[Model]) -> None:
        """Ask models that see the same pixels."""
        shared = SharedImage(self._pipeline.decoders, data, models[0].manifest.preprocessing, self._state)
        try:
            async with asyncio.TaskGroup() as group:
                showing = group.create_task(self._show(shared, models))
                asked = [group.create_task(self._ask(model, shared, showing)) for model in models]
                await asyncio.wait(asked)
                # It would wait forever if no model was accepted.
                showing.cancel()
        finally:
            shared.close()

    async def _show(self, shared: SharedImage, models: list[Model]) -> None:
        pixels = await asyncio.shield(shared.outcome)
        if isinstance(pixels, RequestError):
            return
        try:
            # Waiting for a thread would take longer than encoding a small picture, and the answers wait for it.
            small = pixels.nbytes <= _SMALL_BYTES
            png = _png(pixels) if small else await self._pipeline.decoders.run(self._state, lambda: _png(pixels))
        except RequestError:
            # The request is over; its models report that too.
            return
        height, width, _ = pixels.shape
        self._emit(Picture(models=[model.name for model in models], width=width, height=height, png=png))

    async def _ask(self, model: Model, shared: SharedImage, showing: "asyncio.Task[None]") -> None:
        async def give(_: Place) -> Inputs:
            return Inputs(shared=shared)

        options = self._options.model_copy(update={"model": model.name, "version": model.version})
        try:
            written, answer = await self._pipeline.answer(
                options,
                arrived_at=self._arrived_at,
                read=give,
                write=self._write,
                watching=self._watching,
                encoded_bytes=None,
            )
        except RequestError as error:
            self._fail(Failed(model=model.name, error=error.with_traceback(None)))
            return
        await asyncio.wait([showing])
        self._top1.append((model, int(answer.outputs[0].probabilities.argmax())))
        self._emit(Answered(answer=answer, written=written))

    def _emit(self, event: Event[T]) -> None:
        self._succeeded = True
        self.events.put_nowait(event)
        for failed in self._failed:
            self.events.put_nowait(failed)
        self._failed = []

    def _fail(self, failed: Failed) -> None:
        if self._succeeded:
            self.events.put_nowait(failed)
        else:
            self._failed.append(failed)

    def _leave(self) -> None:
        for leave in tuple(self._leaving):
            leave()

    @contextmanager
    def _watching(self, leave: Callable[[], None]) -> Iterator[None]:
        """As `watching` of `Pipeline.answer`, for one model of several."""
        self._leaving.add(leave)
        if self._state.disconnected:
            leave()
        try:
            yield
        finally:
            self._leaving.discard(leave)


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    # A higher level would save little, and the picture is shown only once.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
