"""Whatever happens to a comparison on its way, nothing of it stays behind."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.app import make_pipeline
from service.comparison import Answered, Ended, Event, Failed, Picture, compare
from service.errors import BadRequest, ClientDisconnected, ImageError, Overloaded, RequestError
from service.http.client import Client
from service.images import ImageRules
from service.metrics import Metrics
from service.pipeline import Answer, Pipeline, RequestOptions
from service.scheduling.admission import Place
from service.settings import Settings
from tests.processes import PATIENCE_SECONDS
from tests.service.identity import number_in, picture, publish_identity

World = tuple[asyncio.Runner, Pipeline]

FATES = ("answered", "cancelled", "closed", "disconnects", "body fails", "bad image", "decoder fails", "late")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A started pipeline of three models, and the event loop that it runs on."""
    repository = tmp_path_factory.mktemp("models")
    for name in ("identity-a", "identity-b", "identity-c"):
        publish_identity(repository, name)
    deadlines: dict[str, Any] = {
        "default_deadline_ms": 1000 * PATIENCE_SECONDS,
        "max_deadline_ms": 1000 * PATIENCE_SECONDS,
    }
    pipeline = make_pipeline(Settings(repository=repository, threads=1, max_batch=4, **deadlines), Metrics())

    async def start() -> None:
        pipeline.start()

    with asyncio.Runner() as runner:
        runner.run(start())
        yield runner, pipeline
        runner.run(pipeline.close())


async def ask(pipeline: Pipeline, number: int, fate: str) -> list[Event[int]]:
    """The events of a comparison of all models."""
    client = Client()

    async def read(place: Place) -> bytes:
        place.hold_bytes(10)
        await asyncio.sleep(0)
        if fate == "body fails":
            raise BadRequest("planted")
        if fate == "disconnects":
            client.leave()
        return {"bad image": b"\x89PNG", "decoder fails": b"fails"}.get(fate, picture(number))

    def write(answer: Answer) -> int:
        return number_in(answer.outputs[0].logits)

    events = compare(
        pipeline,
        pipeline.registry.ready,
        RequestOptions(deadline_ms=0.5 if fate == "late" else None),
        arrived_at=time.perf_counter(),
        read=read,
        write=write,
        watching=client.watched,
        encoded_bytes=0,
    )
    found = []
    async with aclosing(events):
        async for event in events:
            found.append(event)
            if fate == "closed":
                break
    return found


@settings(max_examples=30, deadline=None)
@given(plan=st.lists(st.tuples(st.sampled_from(FATES), st.integers(0, 20)), min_size=1, max_size=8))
def test_nothing_stays_behind_wherever_a_comparison_fails(world: World, plan: list[tuple[str, int]]) -> None:
    runner, pipeline = world
    opening = ImageRules.open

    def faulty(self: ImageRules, data: bytes, *more: object) -> object:
        if data == b"fails":
            raise RuntimeError("planted")
        return opening(self, data, *more)  # type: ignore[arg-type]

    async def scenario() -> None:
        before, unhandled = asyncio.all_tasks(), list[dict[str, object]]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        tasks = []
        for number, (fate, turns) in enumerate(plan, start=1):
            task = asyncio.create_task(ask(pipeline, number, fate))
            for _ in range(turns):
                await asyncio.sleep(0)
            if fate == "cancelled":
                task.cancel()
            tasks.append((number, fate, task))
        for number, fate, task in tasks:
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            if fate == "answered":
                assert isinstance(outcome, list)
                assert isinstance(outcome[0], Picture)
                assert isinstance(outcome[-1], Ended)
                assert [event.written for event in outcome[1:-1] if isinstance(event, Answered)] == [number] * 3
            elif fate == "bad image":
                assert isinstance(outcome, ImageError)
            elif fate == "body fails":
                assert isinstance(outcome, BadRequest)
            elif fate == "decoder fails":
                assert isinstance(outcome, ExceptionGroup)
            elif fate == "late":
                assert isinstance(outcome, list | RequestError)
            elif fate == "disconnects":
                assert isinstance(outcome, ClientDisconnected)
            else:
                assert isinstance(outcome, list | asyncio.CancelledError)
        # Also what was begun for those that were closed or cancelled.
        assert asyncio.all_tasks() <= before
        assert unhandled == []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageRules, "open", faulty)
        runner.run(asyncio.wait_for(scenario(), PATIENCE_SECONDS))
    assert (pipeline.admission.images, pipeline.admission.bytes) == (0, 0)
    for model in pipeline.registry.ready:
        backlog = model.queue.backlog
        assert (len(model.queue), backlog.waiting, backlog.undecoded) == (0, 0, 0)
        assert [(work.small, work.large) for work in backlog.of_class] == [(0, 0), (0, 0)]
        # Nobody holds the model any more, so that it could be unloaded.
        runner.run(asyncio.wait_for(model.unused(), PATIENCE_SECONDS))


def test_if_the_first_model_is_refused_the_next_accounts_for_the_decoding(world: World) -> None:
    runner, pipeline = world
    accept, accounted = pipeline.admission.accept, []

    def refuse_the_first(place: Place, queue: object, images: int, *, decoding: list[int]) -> None:
        accounted.append(bool(decoding))
        if len(accounted) == 1:
            raise Overloaded("planted", reason="images", retry_after_s=1)
        accept(place, queue, images, decoding=decoding)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.admission, "accept", refuse_the_first)
        events = runner.run(ask(pipeline, 5, "answered"))
    assert accounted == [True, True, False]
    assert [type(event) for event in events if not isinstance(event, Answered)] == [Picture, Failed, Ended]
