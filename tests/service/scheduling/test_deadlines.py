"""Deadlines, disconnected clients and families over HTTP: no work in vain, and no late answer without a word."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Message

from service.app import create_app
from service.errors import EngineError
from service.http.client import Client
from service.pipeline import Pipeline
from service.scheduling.cost import Cost
from service.scheduling.request import RequestState
from service.scheduling.scheduler import Outputs
from service.settings import Settings
from tests.processes import PATIENCE_SECONDS, wait_until
from tests.service.conftest import encoded, images_waiting, noise, until
from tests.service.identity import picture, publish_identity

DECODED = 'stridevit_stage_duration_seconds_count{model="identity-fast",stage="decode"}'
ENGINE_ROWS = 'stridevit_engine_rows_total{kind="image",model="identity-fast"}'


class ShiftedClock:
    """The real time, and what a test adds to it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self.ahead


@pytest.fixture
def clock() -> ShiftedClock:
    return ShiftedClock()


@pytest.fixture
def app(tmp_path: Path, clock: ShiftedClock) -> FastAPI:
    """Two models of one family: by the cost model, the accurate one takes 2 s and the other 10 ms for an image."""
    publish_identity(tmp_path, "identity-slow", top1=0.8)
    publish_identity(tmp_path, "identity-fast", top1=0.6)
    settings = Settings(repository=tmp_path, threads=1, max_batch=1, default_model="identity-fast")
    app = create_app(settings, clock=clock)
    pipeline = app.state.pipeline
    for name, seconds in (("identity-slow", 2.0), ("identity-fast", 0.010)):
        pipeline.registry.find(name).queue.cost = Cost({1: seconds}, pipeline.load)
    return app


@pytest.fixture
def pipeline(app: FastAPI) -> Pipeline:
    found = app.state.pipeline
    assert isinstance(found, Pipeline)
    return found


@pytest.fixture
def client(app: FastAPI, pipeline: Pipeline) -> Iterator[TestClient]:
    with TestClient(app) as session:
        # On a busy machine the event loop may be late enough for a refusal.
        assert session.portal
        session.portal.call(pipeline.lag.stop)
        yield session


def metric(client: TestClient, line: str) -> float:
    """The value of one time series; 0 if it does not exist yet."""
    for row in client.get("/metrics").text.splitlines():
        if row.startswith(line + " "):
            return float(row.rpartition(" ")[2])
    return 0.0


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?deadline_ms=0.001", {}),
        ("", {"X-Deadline-Ms": "0.001"}),
        ("?deadline_ms=1000", {"X-Deadline-Ms": "0.001"}),
        ("?deadline_ms=0.001", {"X-Deadline-Ms": "1000"}),
    ],
)
def test_a_request_that_cannot_finish_in_time_is_rejected_before_its_body_is_read(
    client: TestClient, query: str, headers: dict[str, str]
) -> None:
    answer = client.post("/v1/classify" + query, content=picture(1), headers=headers)
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    assert "the deadline leaves" in answer.json()["detail"]
    assert metric(client, 'stridevit_rejections_total{reason="deadline"}') == 1
    assert metric(client, DECODED) == 0


def test_a_lone_large_photo_with_a_near_deadline_is_refused_before_it_is_decoded(
    client: TestClient, pipeline: Pipeline
) -> None:
    pipeline.load._seconds_per_pixel = 1e-5
    photo = encoded(noise(1600, 1200), "JPEG")
    refused = client.post("/v1/classify?deadline_ms=1000", content=photo)
    assert (refused.status_code, "the work ahead takes about" in refused.json()["detail"]) == (429, True)
    assert refused.json()["retry_after_ms"] > 30
    assert metric(client, DECODED) == 0
    assert client.post("/v1/classify?deadline_ms=60000", content=photo).status_code == 200


def test_deadlines_have_a_default_and_a_maximum(tmp_path: Path) -> None:
    publish_identity(tmp_path)
    settings = Settings(repository=tmp_path, threads=1, default_deadline_ms=300_000, max_deadline_ms=600_000)
    with TestClient(create_app(settings)) as client:
        pipeline = client.app.state.pipeline  # type: ignore[attr-defined]
        assert client.portal
        client.portal.call(pipeline.lag.stop)
        for seconds, accepted in ((100, {"", "?deadline_ms=1e8"}), (300, {"?deadline_ms=1e8"}), (550, set())):
            for query in ("", "?deadline_ms=1e8"):
                # An answer may come before its batch counts as done.
                wait_until(lambda: not pipeline.scheduler.lanes.runs)
                pipeline.registry.find("identity-a").queue.cost = Cost({1: seconds}, pipeline.load)
                pipeline.load.slowdown.value = 1.0
                status = client.post(f"/v1/classify{query}", content=picture(1)).status_code
                assert status == (200 if query in accepted else 429), (seconds, query)


def test_a_family_answers_with_its_most_accurate_model_and_says_so(client: TestClient) -> None:
    answer = client.post("/v1/classify?model=identity", content=picture(1))
    body = answer.json()
    assert (body["model"], body["requested"]) == ("identity-slow", "identity")
    assert (body["choice"]["reason"], body["choice"]["skipped"]) == ("most_accurate", [])
    assert answer.headers["x-stridevit-choice"] == "most_accurate"
    labels = 'family="identity",model="identity-slow",reason="most_accurate"'
    assert metric(client, f"stridevit_choices_total{{{labels}}}") == 1


def test_a_family_meets_a_tight_deadline_with_a_faster_model(client: TestClient, pipeline: Pipeline) -> None:
    pipeline.registry.find("identity-slow").queue.cost = Cost({1: 25.0}, pipeline.load)
    answer = client.post("/v1/classify?model=identity&deadline_ms=25000", content=picture(1))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["model"], body["choice"]["reason"]) == ("identity-fast", "deadline")
    (skipped,) = body["choice"]["skipped"]
    assert skipped["model"] == "identity-slow"
    assert skipped["predicted_ms"] >= 25_000


def test_a_lowest_accuracy_is_kept_rather_than_the_deadline(client: TestClient) -> None:
    answer = client.post("/v1/classify?model=identity&deadline_ms=2000&min_top1=0.7", content=picture(1))
    assert answer.status_code == 429
    answer = client.post("/v1/classify?model=identity&min_top1=0.9", content=picture(1))
    assert (answer.status_code, "reaches a top-1 of 0.9" in answer.json()["detail"]) == (422, True)
    assert answer.json()["code"] == "no-suitable-model"


def test_v2_answers_with_a_family_too(client: TestClient) -> None:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": list(range(12))}
    answer = client.post("/v2/models/identity/infer", content=json.dumps({"inputs": [tensor]}))
    body = answer.json()
    assert (body["model_name"], body["parameters"]) == (
        "identity-slow",
        {"family": "identity", "choice": "most_accurate"},
    )
    late = {"inputs": [tensor], "parameters": {"timeout": 1}}
    rejected = client.post("/v2/models/identity/infer", content=json.dumps(late))
    assert (rejected.status_code, list(rejected.json())) == (429, ["error"])


class Caller:
    """A request straight to the application, from our own server or from another one, whose client can leave."""

    def __init__(self, app: FastAPI, query: str = "", *, own_server: bool = False) -> None:
        self._app, self._query = app, query
        self._client = Client() if own_server else None
        self._leave = asyncio.Event()
        self._sent = False
        self.answer: list[Message] = []
        self.noticed = False
        """Whether the service knows that the client has left."""

    async def receive(self) -> Message:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": picture(1)}
        await self._leave.wait()
        self.noticed = True
        return {"type": "http.disconnect"}

    async def nothing(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.answer.append(message)

    async def disconnect(self) -> None:
        if self._client:
            self._client.leave()
            return
        self._leave.set()
        await until(lambda: self.noticed)

    async def call(self) -> None:
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/classify", "headers": []}
        state = {"client": self._client} if self._client else {}
        await self._app({**scope, "query_string": self._query.encode(), "state": state}, self.receive, self.send)


@asynccontextmanager
async def occupied(call: Callable[[Callable[[], object]], Any]) -> Any:
    """Occupy a thread, by a `call` that takes what the thread is to do, until the block ends."""
    started, end = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        assert end.wait(60)

    task = asyncio.ensure_future(call(work))
    await until(started.is_set)
    yield
    end.set()
    await task


def busy_decoder(pipeline: Pipeline) -> AbstractAsyncContextManager[None]:
    return occupied(lambda work: pipeline.decoders.run(RequestState(seconds=1e6), work))


def busy_engine(pipeline: Pipeline) -> AbstractAsyncContextManager[None]:
    return occupied(lambda work: asyncio.to_thread(pipeline.scheduler.on_engine, work))


def drive(client: TestClient, scenario: Callable[[], Any]) -> None:
    assert client.portal
    client.portal.call(lambda: asyncio.wait_for(scenario(), PATIENCE_SECONDS))


def test_a_client_that_leaves_before_decode_costs_no_decoding(
    client: TestClient, app: FastAPI, pipeline: Pipeline
) -> None:
    async def scenario() -> None:
        callers = [Caller(app, own_server=number % 2 == 0) for number in range(5)]
        async with busy_decoder(pipeline):
            tasks = [asyncio.create_task(caller.call()) for caller in callers]
            await until(lambda: pipeline.admission.images == 5)
            for caller in callers[1:]:
                await caller.disconnect()
        await asyncio.gather(*tasks)
        assert callers[0].answer[0]["status"] == 200

    drive(client, scenario)
    assert metric(client, DECODED) == 1
    assert metric(client, ENGINE_ROWS) == 1
    assert metric(client, 'stridevit_rejections_total{reason="client-disconnected"}') == 4
    assert metric(client, "stridevit_pending_images") == 0


def test_a_client_that_leaves_before_the_batch_costs_no_engine_row(
    client: TestClient, app: FastAPI, pipeline: Pipeline
) -> None:
    async def scenario() -> None:
        callers = [Caller(app, own_server=number % 2 == 0) for number in range(5)]
        async with busy_engine(pipeline):
            tasks = [asyncio.create_task(caller.call()) for caller in callers]
            await until(lambda: images_waiting(pipeline.scheduler) == 5)
            for caller in callers[2:]:
                await caller.disconnect()
        await asyncio.gather(*tasks)

    drive(client, scenario)
    assert metric(client, DECODED) == 5
    assert metric(client, ENGINE_ROWS) == 2
    assert metric(client, 'stridevit_rejections_total{reason="client-disconnected"}') == 3


def test_an_expired_request_is_dropped_before_decode_with_a_504(
    client: TestClient, app: FastAPI, pipeline: Pipeline, clock: ShiftedClock
) -> None:
    async def scenario() -> None:
        caller = Caller(app, "deadline_ms=60000")
        async with busy_decoder(pipeline):
            task = asyncio.create_task(caller.call())
            await until(lambda: pipeline.admission.images == 1)
            clock.ahead += 61
        await task
        assert caller.answer[0]["status"] == 504
        assert b"nothing was computed" in caller.answer[1]["body"]

    drive(client, scenario)
    assert metric(client, DECODED) == 0
    assert metric(client, ENGINE_ROWS) == 0
    assert metric(client, 'stridevit_rejections_total{reason="deadline-exceeded"}') == 1
    assert metric(client, 'stridevit_images_total{model="identity-fast",outcome="deadline-exceeded"}') == 1


def test_a_body_that_has_not_arrived_by_the_deadline_is_a_504(
    client: TestClient, app: FastAPI, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(pipeline.admission, "require_in_time", lambda *_: None)
        caller = Caller(app, "deadline_ms=500")
        caller.receive = caller.nothing  # type: ignore[method-assign]
        await caller.call()
        assert caller.answer[0]["status"] == 504
        assert b"before the body had arrived" in caller.answer[1]["body"]

    drive(client, scenario)


def test_an_engine_that_fails_is_a_fault_of_the_model_for_its_request_and_leaves_nothing_behind(
    client: TestClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = pipeline.registry.find("identity-fast").queue
    working = queue.run

    def fail(_: object) -> Outputs:
        raise EngineError("planted")

    monkeypatch.setattr(queue, "run", fail)
    files = [("image", (f"{number}.png", picture(number))) for number in range(3)]
    answer = client.post("/v1/classify", files=files)
    assert (answer.status_code, answer.json()["code"]) == (500, "model-fault")
    assert "model 'identity-fast' version 1 failed on this image" in answer.json()["detail"]
    assert "planted" not in answer.text, "the engine's own words are for the log"
    assert pipeline.admission.images == 0
    assert images_waiting(pipeline.scheduler) == 0
    assert (queue.backlog.waiting, queue.backlog.undecoded) == (0, 0)
    monkeypatch.setattr(queue, "run", working)
    assert client.post("/v1/classify", content=picture(1)).status_code == 200
    assert metric(client, 'stridevit_batch_errors_total{model="identity-fast"}') >= 1


def test_over_a_real_socket_a_closed_connection_is_noticed(app: FastAPI, pipeline: Pipeline) -> None:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    started, end = threading.Event(), threading.Event()

    def occupy() -> None:
        started.set()
        assert end.wait(60)

    with ThreadPoolExecutor(2) as pool:
        serving = pool.submit(server.run)
        wait_until(lambda: server.started)
        occupied = pool.submit(pipeline.scheduler.on_engine, occupy)
        assert started.wait(60)
        address = server.servers[0].sockets[0].getsockname()
        body = picture(1)
        head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        callers = [socket.create_connection(address) for _ in range(12)]
        for caller in callers:
            caller.sendall(head + body)
        wait_until(lambda: images_waiting(pipeline.scheduler) == 12)
        for caller in callers[1:]:
            caller.close()
        wait_until(lambda: pipeline.admission.images == 1)
        end.set()
        assert callers[0].recv(12) == b"HTTP/1.1 200"
        callers[0].close()
        wait_until(lambda: pipeline.admission.images == 0)
        server.should_exit = True
        serving.result(60)
        occupied.result(60)
    text = pipeline.metrics.render().decode()
    assert f"{ENGINE_ROWS} 1.0" in text
    assert 'stridevit_rejections_total{reason="client-disconnected"} 11.0' in text
