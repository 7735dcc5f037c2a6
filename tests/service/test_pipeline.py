"""Whatever happens to a request on its way, nothing of it stays behind, and no other request is affected."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service.app import make_pipeline
from service.errors import BadRequest, ClientDisconnected, ImageError, NotReady, RequestError
from service.http.client import Client
from service.images import LARGE_PIXELS, ImageRules
from service.metrics import Metrics
from service.pipeline import Answer, Inputs, Pipeline, RequestOptions
from service.scheduling.admission import Place
from service.scheduling.backlog import work_of
from service.scheduling.request import RequestState
from service.scheduling.scheduler import Batch, Output, Pixels
from service.settings import Settings
from tests.processes import PATIENCE_SECONDS
from tests.service.identity import number_in, picture, publish_identity

World = tuple[asyncio.Runner, Pipeline]

FATES = ("answered", "cancelled", "disconnects", "body fails", "one bad image", "all bad images", "writing fails")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A started pipeline, and the event loop that it runs on."""
    repository = tmp_path_factory.mktemp("models")
    publish_identity(repository)
    deadlines: dict[str, Any] = {
        "default_deadline_ms": 1000 * PATIENCE_SECONDS,
        "max_deadline_ms": 1000 * PATIENCE_SECONDS,
    }
    options = Settings(repository=repository, threads=1, max_batch=4, max_consecutive_faults=0, **deadlines)
    pipeline = make_pipeline(options, Metrics())

    async def start() -> None:
        pipeline.start()

    with asyncio.Runner() as runner:
        runner.run(start())
        yield runner, pipeline
        runner.run(pipeline.close())


async def ask(
    pipeline: Pipeline, numbers: list[int], *, fate: str = "answered", encoded: bool = True, encoded_bytes: int = 0
) -> list[int]:
    """The numbers in the answers to pictures of `numbers`; one that has failed is -1."""
    client = Client()
    damaged = {"one bad image": numbers[:1], "all bad images": numbers}.get(fate, [])

    async def read(place: Place) -> Inputs:
        place.hold_bytes(100)
        await asyncio.sleep(0)
        if fate == "body fails":
            raise BadRequest("planted")
        if fate == "disconnects":
            client.leave()
        if encoded:
            return Inputs(images=[b"\x89PNG" if number in damaged else picture(number) for number in numbers])
        pixels = np.zeros((len(numbers), 2, 2, 3), dtype=np.uint8)
        pixels[:, 0, 0, 0] = numbers
        return Inputs(images=pixels)

    def write(answer: Answer) -> list[int]:
        if fate == "writing fails":
            raise RuntimeError("planted")
        return [number_in(image.logits) if isinstance(image, Output) else -1 for image in answer.images]

    written, answer = await pipeline.answer(
        RequestOptions(deadline_ms=10.0 if fate == "late" else None),
        arrived_at=time.perf_counter(),
        read=read,
        write=write,
        watching=client.watched,
        encoded_bytes=encoded_bytes if encoded else None,
        partial=True,
    )
    assert set(answer.timings_ms) == {"read", "decode", "queue", "inference", "total"}
    return written


@settings(max_examples=25, deadline=None)
@given(
    plan=st.lists(
        st.tuples(st.sampled_from(FATES), st.integers(1, 3), st.booleans(), st.integers(0, 12)),
        min_size=1,
        max_size=12,
    )
)
def test_nothing_stays_behind_wherever_a_request_fails(world: World, plan: list[tuple[str, int, bool, int]]) -> None:
    runner, pipeline = world

    async def scenario() -> None:
        tasks = []
        for place, (fate, images, encoded, turns) in enumerate(plan):
            numbers = [1 + 3 * place + image for image in range(images)]
            task = asyncio.create_task(ask(pipeline, numbers, fate=fate, encoded=encoded))
            for _ in range(turns):
                await asyncio.sleep(0)
            if fate == "cancelled":
                task.cancel()
            tasks.append((fate, numbers, encoded, task))
        for fate, numbers, encoded, task in tasks:
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            if fate == "answered" or (fate.endswith("images") and not encoded):
                assert outcome == numbers
            elif fate == "one bad image" and len(numbers) > 1 and encoded:
                assert outcome == [-1, *numbers[1:]]
            elif fate.endswith(("image", "images")) and encoded:
                assert isinstance(outcome, ImageError)
            elif fate == "body fails":
                assert isinstance(outcome, BadRequest)
            elif fate == "writing fails":
                assert isinstance(outcome, RuntimeError)
            else:
                assert outcome == numbers or isinstance(outcome, ClientDisconnected | asyncio.CancelledError)

    runner.run(asyncio.wait_for(scenario(), PATIENCE_SECONDS))
    admission, (model,) = pipeline.admission, pipeline.registry.ready
    backlog = model.queue.backlog
    assert (admission.images, admission.bytes, backlog.waiting, backlog.undecoded) == (0, 0, 0, 0)
    assert backlog.decoding == {False: 0, True: 0}
    assert [(work.small, work.large) for work in backlog.of_class] == [(0, 0), (0, 0)]
    # Nobody holds the model any more, so that it could be unloaded.
    runner.run(asyncio.wait_for(model.unused(), PATIENCE_SECONDS))


ENGINE = ("right", "right", "raises", "nan", "fewer rows", "nothing")


@settings(max_examples=25, deadline=None)
@given(
    plan=st.lists(
        st.tuples(st.sampled_from(("answered", "cancelled", "disconnects", "late")), st.integers(1, 3), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    engine=st.lists(st.sampled_from(ENGINE), max_size=20),
    decoders=st.lists(st.booleans(), max_size=20),
    observer_fails=st.booleans(),
)
def test_nothing_stays_behind_whatever_fails_beneath(
    world: World,
    plan: list[tuple[str, int, bool]],
    engine: list[str],
    decoders: list[bool],
    observer_fails: bool,
) -> None:
    """Decoders, engine and the accounting of batches fail at random; no answer is another image's."""
    runner, pipeline = world
    (model,) = pipeline.registry.ready
    decode_well, engine_does = iter(decoders), iter(engine)
    run = model.queue.run

    def faulty_run(images: Pixels, threads: int) -> Any:
        logits, probabilities = run(images, threads)
        match next(engine_does, "right"):
            case "raises":
                raise RuntimeError("planted")
            case "nan":
                logits[0] = np.nan
            case "fewer rows":
                return logits[1:], probabilities[1:]
            case "nothing":
                return None
        return logits, probabilities

    open_image = ImageRules.open

    def faulty_open(*arguments: Any, **options: Any) -> Any:
        if not next(decode_well, True):
            raise RuntimeError("planted")
        return open_image(*arguments, **options)

    def observe(batch: Batch) -> None:
        pipeline._on_batch(batch)
        if observer_fails:
            raise RuntimeError("planted")

    async def scenario() -> None:
        unhandled: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        tasks = []
        for place, (fate, images, encoded) in enumerate(plan):
            numbers = [1 + 3 * place + image for image in range(images)]
            task = asyncio.create_task(ask(pipeline, numbers, fate=fate, encoded=encoded))
            await asyncio.sleep(0)
            if fate == "cancelled":
                task.cancel()
            tasks.append((numbers, task))
        for numbers, task in tasks:
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(outcome, list):
                assert len(outcome) == len(numbers)
                assert all(given in (number, -1) for given, number in zip(outcome, numbers, strict=True))
            else:
                assert isinstance(outcome, RequestError | RuntimeError | asyncio.CancelledError)
        assert unhandled == []

    with pytest.MonkeyPatch.context() as patch, capture_logs():
        patch.setattr(model.queue, "run", faulty_run)
        patch.setattr(ImageRules, "open", faulty_open)
        patch.setattr(pipeline.scheduler, "_on_batch", observe)
        runner.run(asyncio.wait_for(scenario(), PATIENCE_SECONDS))
    admission, backlog = pipeline.admission, model.queue.backlog
    assert (admission.images, admission.bytes, backlog.waiting, backlog.undecoded) == (0, 0, 0, 0)
    assert (backlog.decoding, len(model.queue)) == ({False: 0, True: 0}, 0)
    runner.run(asyncio.wait_for(model.unused(), PATIENCE_SECONDS))


def test_pixels_of_another_size_than_the_replaced_model_s_are_refused(world: World) -> None:
    runner, pipeline = world

    async def read(_: Place) -> Inputs:
        return Inputs(images=np.zeros((1, 3, 3, 3), dtype=np.uint8))

    async def scenario() -> None:
        with pytest.raises(NotReady, match="another image size"):
            await pipeline.answer(
                RequestOptions(),
                arrived_at=time.perf_counter(),
                read=read,
                write=lambda _: None,
                watching=Client().watched,
            )

    runner.run(scenario())


def test_a_form_of_many_small_images_is_not_predicted_as_one_large_one(world: World) -> None:
    runner, pipeline = world
    large = RequestState(seconds=1e6)
    queue = pipeline.registry.ready[0].queue
    # A large image of many seconds, which small ones do not wait for.
    queue.backlog.accept(large, work_of(1, [10**13]))
    try:
        assert runner.run(ask(pipeline, [3, 4], encoded_bytes=5 * LARGE_PIXELS)) == [3, 4]
    finally:
        queue.backlog.release(large)
