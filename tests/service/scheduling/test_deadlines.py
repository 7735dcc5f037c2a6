"""Deadlines, hang-ups and families over HTTP: no work for nobody, and no late answer in silence."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Message

from service.app import create_app
from service.errors import EngineError
from service.pipeline import Classifier
from service.scheduling.request import Backlog, RequestState
from service.scheduling.scheduler import Outputs
from service.settings import Settings
from tests.processes import serving
from tests.service.conftest import until
from tests.service.identity import picture, publish_identity


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    """Two models of one family: one accurate, and slower by far."""
    publish_identity(tmp_path, "identity-slow", top1=0.8, work=500)
    publish_identity(tmp_path, "identity-fast", top1=0.6)
    return create_app(Settings(repository=tmp_path, threads=1, max_batch=1, default_model="identity-fast"))


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as session:
        yield session


def classifier_of(client: TestClient) -> Classifier:
    classifier = client.app.state.classifier  # type: ignore[attr-defined]
    assert isinstance(classifier, Classifier)
    return classifier


def metric(client: TestClient, line: str) -> float:
    """The value of one time series; 0 if it does not exist yet."""
    for row in client.get("/metrics").text.splitlines():
        if row.startswith(line + " "):
            return float(row.rpartition(" ")[2])
    return 0.0


def slow_down(client: TestClient, factor: float) -> None:
    """Make the cost model believe that the device is slower than it was at warm-up."""
    classifier_of(client).load.slowdown *= factor


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?deadline_ms=0.001", {}),
        ("", {"X-Deadline-Ms": "0.001"}),
        ("?deadline_ms=1000", {"X-Deadline-Ms": "0.001"}),
        ("?deadline_ms=0.001", {"X-Deadline-Ms": "1000"}),
    ],
)
def test_what_cannot_finish_in_time_is_refused_before_its_body_is_read(
    client: TestClient, query: str, headers: dict[str, str]
) -> None:
    answer = client.post("/v1/classify" + query, content=picture(1), headers=headers)
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    assert "the deadline leaves" in answer.json()["detail"]
    assert metric(client, 'stridevit_rejections_total{reason="deadline"}') == 1
    assert metric(client, 'stridevit_stage_duration_seconds_count{model="identity-fast",stage="decode"}') == 0


def test_a_deadline_beyond_the_maximum_is_cut_to_it(tmp_path: Path) -> None:
    publish_identity(tmp_path)
    settings = Settings(repository=tmp_path, threads=1, default_deadline_ms=5, max_deadline_ms=10)
    with TestClient(create_app(settings)) as client:
        slow_down(client, 1e6)
        assert client.post("/v1/classify?deadline_ms=100000000", content=picture(1)).status_code == 429


def test_without_a_deadline_the_default_one_counts(tmp_path: Path) -> None:
    publish_identity(tmp_path)
    with TestClient(create_app(Settings(repository=tmp_path, threads=1, default_deadline_ms=50))) as client:
        assert client.post("/v1/classify", content=picture(1)).status_code == 200
        slow_down(client, 1e6)
        assert client.post("/v1/classify", content=picture(1)).status_code == 429


def test_a_family_answers_with_its_most_accurate_model_and_says_so(client: TestClient) -> None:
    answer = client.post("/v1/classify?model=identity", content=picture(1))
    body = answer.json()
    assert (body["model"], body["requested"]) == ("identity-slow", "identity")
    assert (body["choice"]["reason"], body["choice"]["skipped"]) == ("most_accurate", [])
    assert answer.headers["x-stridevit-choice"] == "most_accurate"
    labels = 'family="identity",model="identity-slow",reason="most_accurate"'
    assert metric(client, f"stridevit_choices_total{{{labels}}}") == 1


def test_a_family_keeps_a_tight_deadline_with_a_faster_model(client: TestClient) -> None:
    slow_down(client, 500)
    answer = client.post("/v1/classify?model=identity&deadline_ms=1000", content=picture(1))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["model"], body["choice"]["reason"]) == ("identity-fast", "deadline")
    (skipped,) = body["choice"]["skipped"]
    assert skipped["model"] == "identity-slow"
    assert skipped["predicted_ms"] > 1000


def test_a_floor_is_kept_rather_than_the_deadline(client: TestClient) -> None:
    slow_down(client, 500)
    answer = client.post("/v1/classify?model=identity&deadline_ms=1000&min_top1=0.7", content=picture(1))
    assert answer.status_code == 429
    answer = client.post("/v1/classify?model=identity&min_top1=0.9", content=picture(1))
    assert (answer.status_code, "reaches a top-1 of 0.9" in answer.json()["detail"]) == (422, True)


def test_the_family_stands_behind_v2_too(client: TestClient) -> None:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": list(range(12))}
    answer = client.post("/v2/models/identity/infer", content=json.dumps({"inputs": [tensor]}))
    body = answer.json()
    assert (body["model_name"], body["parameters"]) == (
        "identity-slow",
        {"family": "identity", "choice": "most_accurate"},
    )
    late = {"inputs": [tensor], "parameters": {"timeout": 1}}
    refused = client.post("/v2/models/identity/infer", content=json.dumps(late))
    assert (refused.status_code, list(refused.json())) == (429, ["error"])


class Caller:
    """A request straight to the application, whose caller can hang up."""

    def __init__(self, app: FastAPI, query: str = "") -> None:
        self._app, self._query = app, query
        self._left = asyncio.Event()
        self.answer: list[Message] = []
        self._sent = False

    async def receive(self) -> Message:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": picture(1)}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def nothing(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.answer.append(message)

    def hang_up(self) -> None:
        self._left.set()

    async def call(self) -> None:
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/classify", "headers": []}
        await self._app({**scope, "query_string": self._query.encode()}, self.receive, self.send)


def drive(client: TestClient, app: FastAPI, scenario: Callable[[], Any]) -> None:
    assert client.portal
    client.portal.call(lambda: asyncio.wait_for(scenario(), 20))


def test_who_hangs_up_before_decode_is_not_decoded(client: TestClient, app: FastAPI) -> None:
    classifier = classifier_of(client)

    async def scenario() -> None:
        hold = threading.Event()
        held = asyncio.create_task(classifier.run_in_decode_pool(RequestState(seconds=60), lambda: hold.wait(10)))
        await asyncio.sleep(0.02)
        callers = [Caller(app) for _ in range(5)]
        tasks = [asyncio.create_task(caller.call()) for caller in callers]
        await until(lambda: classifier.admission.images == 5)
        await asyncio.sleep(0.05)
        for caller in callers[1:]:
            caller.hang_up()
        await asyncio.sleep(0.05)
        hold.set()
        await asyncio.gather(held, *tasks)
        assert callers[0].answer[0]["status"] == 200

    drive(client, app, scenario)
    assert metric(client, 'stridevit_stage_duration_seconds_count{model="identity-fast",stage="decode"}') == 1
    assert metric(client, 'stridevit_engine_rows_total{kind="image",model="identity-fast"}') == 1
    assert metric(client, 'stridevit_rejections_total{reason="hung_up"}') == 4
    assert metric(client, "stridevit_pending_images") == 0


def test_who_hangs_up_before_the_batch_costs_no_engine_row(client: TestClient, app: FastAPI) -> None:
    classifier = classifier_of(client)

    async def scenario() -> None:
        hold = threading.Event()
        held = asyncio.create_task(asyncio.to_thread(classifier.scheduler.on_engine, lambda: hold.wait(10)))
        await asyncio.sleep(0.02)
        callers = [Caller(app) for _ in range(5)]
        tasks = [asyncio.create_task(caller.call()) for caller in callers]
        await until(lambda: classifier.scheduler.waiting == 5)
        for caller in callers[2:]:
            caller.hang_up()
        await asyncio.sleep(0.05)
        hold.set()
        await asyncio.gather(held, *tasks)

    drive(client, app, scenario)
    assert metric(client, 'stridevit_stage_duration_seconds_count{model="identity-fast",stage="decode"}') == 5
    assert metric(client, 'stridevit_engine_rows_total{kind="image",model="identity-fast"}') == 2
    assert metric(client, 'stridevit_rejections_total{reason="hung_up"}') == 3


def test_an_expired_request_is_dropped_before_decode_and_told_so(client: TestClient, app: FastAPI) -> None:
    classifier = classifier_of(client)

    async def scenario() -> None:
        hold = threading.Event()
        held = asyncio.create_task(classifier.run_in_decode_pool(RequestState(seconds=60), lambda: hold.wait(10)))
        await asyncio.sleep(0.02)
        caller = Caller(app, "deadline_ms=100")
        task = asyncio.create_task(caller.call())
        await asyncio.sleep(0.2)
        hold.set()
        await asyncio.gather(held, task)
        assert caller.answer[0]["status"] == 504
        assert b"nothing was computed" in caller.answer[1]["body"]

    drive(client, app, scenario)
    assert metric(client, 'stridevit_stage_duration_seconds_count{model="identity-fast",stage="decode"}') == 0
    assert metric(client, 'stridevit_engine_rows_total{kind="image",model="identity-fast"}') == 0
    assert metric(client, 'stridevit_rejections_total{reason="expired"}') == 1


def test_a_body_that_is_not_there_by_the_deadline_is_a_504(client: TestClient, app: FastAPI) -> None:
    async def scenario() -> None:
        caller = Caller(app, "deadline_ms=100")
        caller.receive = caller.nothing  # type: ignore[method-assign]
        await caller.call()
        assert caller.answer[0]["status"] == 504
        assert b"before the body had arrived" in caller.answer[1]["body"]

    drive(client, app, scenario)


def test_an_engine_that_fails_is_a_500_for_its_request_and_leaves_nothing_behind(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = classifier_of(client)
    queue = classifier.registry.find("identity-fast").queue
    working = queue.run

    def fail(_: object) -> Outputs:
        raise EngineError("planted")

    monkeypatch.setattr(queue, "run", fail)
    files = [("image", (f"{number}.png", picture(number))) for number in range(3)]
    with pytest.raises(EngineError, match="planted"):
        client.post("/v1/classify", files=files)
    assert classifier.admission.images == 0
    assert classifier.scheduler.waiting == 0
    assert queue.backlog == Backlog()
    monkeypatch.setattr(queue, "run", working)
    assert client.post("/v1/classify", content=picture(1)).status_code == 200
    assert metric(client, 'stridevit_batch_errors_total{model="identity-fast"}') >= 1


def test_over_a_real_socket_a_hang_up_is_noticed(tmp_path: Path) -> None:
    publish_identity(tmp_path, work=3000)
    settings = {"STRIDEVIT_MAX_BATCH": "1", "STRIDEVIT_THREADS": "1"}
    with serving(tmp_path, environment=settings) as (url, _):
        address = url.removeprefix("http://").split(":")
        body = picture(1)
        head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        callers = [socket.create_connection((address[0], int(address[1]))) for _ in range(12)]
        for caller in callers:
            caller.sendall(head + body)
        for caller in callers[1:]:
            caller.close()
        assert callers[0].recv(12) == b"HTTP/1.1 200"
        deadline = time.monotonic() + 30
        while "stridevit_pending_images 0.0" not in (text := httpx.get(url + "/metrics").text):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        callers[0].close()
        (rows,) = [line for line in text.splitlines() if line.startswith('stridevit_engine_rows_total{kind="image"')]
        assert float(rows.rpartition(" ")[2]) < 12
        assert 'stridevit_rejections_total{reason="hung_up"}' in text
