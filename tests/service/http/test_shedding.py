"""Requests without a chance are refused first of all: by the head alone, counted, and with all that a refusal needs."""

import asyncio
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Message

from service.app import create_app
from service.pipeline import Pipeline
from service.settings import Settings
from tests.service.identity import picture, publish_identity


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    repository = tmp_path_factory.mktemp("models")
    publish_identity(repository)
    settings = Settings(
        repository=repository, threads=1, max_pending_images=4, max_images_per_request=1, default_deadline_ms=120_000
    )
    return create_app(settings.model_copy(update={"cors_origins": ("https://example.com",)}))


@pytest.fixture
def pipeline(app: FastAPI) -> Pipeline:
    found = app.state.pipeline
    assert isinstance(found, Pipeline)
    return found


@pytest.fixture(scope="module")
def session(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as session:
        yield session


@pytest.fixture
def client(session: TestClient, pipeline: Pipeline) -> Iterator[TestClient]:
    """Whose event loop is as late as a test says, and no later."""
    assert session.portal
    session.portal.call(pipeline.lag.stop)
    yield session
    session.portal.call(pipeline.lag.stop)


def late(pipeline: Pipeline, seconds: float) -> None:
    pipeline.lag.observe(seconds, 0.0)


def test_a_late_loop_refuses_near_deadlines_and_answers_the_others(client: TestClient, pipeline: Pipeline) -> None:
    late(pipeline, 0.1)
    for query, headers in (("?deadline_ms=250", {}), ("", {"X-Deadline-Ms": "250"}), ("?top_k=1&deadline_ms=250", {})):
        assert client.post(f"/v1/classify{query}", content=picture(1), headers=headers).status_code == 429
    for path in ("/v2/models/identity-a/infer", "/hf/identity-a"):
        assert client.post(f"{path}?deadline_ms=250", content=b"never read").status_code == 429
    assert client.post("/v1/classify", content=picture(1)).status_code == 200
    assert client.post("/v1/classify?deadline_ms=120000", content=picture(1)).status_code == 200


def test_pages_of_other_origins_cannot_read_a_refusal(client: TestClient, pipeline: Pipeline) -> None:
    late(pipeline, 0.5)
    answer = client.post("/v1/classify?deadline_ms=250", content=picture(1), headers={"Origin": "https://other.com"})
    assert (answer.status_code, answer.headers.get("access-control-allow-origin")) == (429, None)
    assert answer.headers["vary"] == "Origin"


def test_a_slash_at_the_end_is_no_way_around_it(client: TestClient, pipeline: Pipeline) -> None:
    late(pipeline, 0.5)
    assert client.post("/v1/classify/?deadline_ms=250", content=picture(1)).status_code == 429


def test_nothing_but_inference_is_ever_refused(client: TestClient, pipeline: Pipeline) -> None:
    late(pipeline, 1.0)
    for path in ("/healthz", "/readyz", "/metrics", "/v1/models", "/v2/health/ready"):
        assert client.get(path).status_code == 200
    assert client.post("/v2/repository/index").status_code == 200
    assert client.post("/v1/classify?deadline_ms=1000", content=picture(1)).status_code == 429


def test_a_refusal_is_complete_and_counted(client: TestClient, pipeline: Pipeline) -> None:
    late(pipeline, 0.5)

    def count(name: str, **labels: str) -> float:
        return pipeline.metrics.registry.get_sample_value(f"stridevit_{name}_total", labels) or 0.0

    before = count("rejections", reason="lag")
    answers = [
        client.post(
            f"{path}?deadline_ms=250",
            content=picture(1),
            headers={"X-Request-ID": "mine", "Origin": "https://example.com"},
        )
        for path in ("/v1/classify", "/v2/models/identity-a/infer", "/hf/identity-a")
    ]
    for answer in answers:
        assert (answer.status_code, answer.headers["x-request-id"]) == (429, "mine")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["access-control-allow-origin"] == "https://example.com"
        assert answer.headers["x-content-type-options"] == "nosniff"
    problem = answers[0].json()
    assert (problem["code"], problem["status"], problem["request_id"]) == ("overloaded", 429, "mine")
    assert problem["retry_after_ms"] >= 500
    assert answers[0].headers["content-type"] == "application/problem+json"
    for answer in answers[1:]:
        assert "overloaded" in answer.json()["error"]
    assert count("rejections", reason="lag") == before + 3
    assert count("requests", route="/hf/{name}", method="POST", status="429") >= 1
    assert count("requests", route="/v1/classify", method="POST", status="429") >= 1
    own = client.post("/v1/classify?deadline_ms=250", content=picture(1), headers={"X-Request-ID": "a b"})
    assert own.json()["request_id"] == own.headers["x-request-id"] != "a b"


def test_without_room_only_the_priority_class_that_has_some_is_let_through(
    client: TestClient, pipeline: Pipeline
) -> None:
    room = pipeline.admission.room
    room.hold_images(3, batch=True)
    try:
        for query, headers in (("?priority=batch", {}), ("", {"X-Priority": "batch"})):
            refused = client.post(f"/v1/classify{query}", content=picture(1), headers=headers)
            assert (refused.status_code, "as many images are pending" in refused.json()["detail"]) == (429, True)
        assert client.post("/v1/classify", content=picture(1)).status_code == 200
    finally:
        room.free_images(3, batch=True)
    assert client.post("/v1/classify?priority=batch", content=picture(1)).status_code == 200


def test_the_age_of_a_request_counts_from_its_first_byte_and_its_body_is_not_read(
    client: TestClient, app: FastAPI, pipeline: Pipeline
) -> None:
    answer: list[Message] = []

    reads: list[bytes] = []

    async def receive() -> Message:
        reads.append(b"")
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        answer.append(message)

    async def ask(age: float, query: bytes) -> None:
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/classify", "headers": []}
        state = {"first_byte_at": time.perf_counter() - age}
        await app({**scope, "query_string": query, "state": state}, receive, send)

    assert client.portal
    for lag in (0.0, 0.05):
        late(pipeline, lag)
        client.portal.call(ask, 0.9, b"deadline_ms=1000")
        assert (answer[0]["status"], reads) == (429, [])
        answer.clear()
    client.portal.call(ask, 0.9, b"deadline_ms=100000")
    assert reads, "there is time enough"


def test_an_odd_deadline_is_left_to_those_who_explain_it(client: TestClient, pipeline: Pipeline) -> None:
    late(pipeline, 0.1)
    for odd in ("soon", "-1", "1e", "9" * 40):
        assert client.post(f"/v1/classify?deadline_ms={odd}", content=picture(1)).status_code == 422


def test_the_time_of_a_request_counts_from_its_first_byte(client: TestClient, app: FastAPI) -> None:
    answer: list[Message] = []
    body = iter([picture(1)])

    async def receive() -> Message:
        for data in body:
            return {"type": "http.request", "body": data}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        answer.append(message)

    async def ask() -> None:
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/classify", "headers": []}
        state = {"first_byte_at": time.perf_counter() - 7}
        await app({**scope, "query_string": b"", "state": state}, receive, send)

    assert client.portal
    client.portal.call(ask)
    headers = dict(answer[0]["headers"])
    total = next(part for part in headers[b"server-timing"].split(b", ") if part.startswith(b"total"))
    assert float(total.rpartition(b"=")[2]) >= 7000


def test_under_pressure_a_head_that_the_work_ahead_leaves_no_chance_is_refused_by_itself(
    client: TestClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[object] = []
    monkeypatch.setattr(pipeline, "answer", lambda *_, **__: bodies.append(None))
    for path in (
        "/v1/classify?deadline_ms=0.001",
        "/v1/classify?model=identity-a&deadline_ms=0.001",
        "/v1/classify?model=identity&deadline_ms=0.001",
        "/v2/models/identity-a/infer?deadline_ms=0.001",
    ):
        monkeypatch.setattr(pipeline.admission, "_pressed_at", math.inf)
        answer = client.post(path, content=picture(1))
        assert (answer.status_code, "the work ahead" in answer.text) == (429, True)
    assert bodies == []


@pytest.mark.parametrize("query", ["model=unknown", "model=identity-a&version=9", "model=identity%2Da&version=1"])
def test_under_pressure_what_the_head_s_first_look_does_not_know_goes_on(
    client: TestClient, pipeline: Pipeline, query: str
) -> None:
    pipeline.admission.press()
    answer = client.post(f"/v1/classify?deadline_ms=120000&{query}", content=picture(1))
    assert answer.status_code in (200, 404)


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?priority=interactive", {"X-Priority": "batch"}),
        ("?deadline_ms=0000000000000000000000000000000000120000", {}),
        ("?deadline%5Fms=120000", {}),
    ],
)
def test_a_head_is_read_as_the_application_reads_it(
    client: TestClient, pipeline: Pipeline, query: str, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.admission, "_pressed_at", math.inf)
    late(pipeline, 0.05)
    room = pipeline.admission.room
    room.hold_images(3, batch=True)
    try:
        answer = client.post(f"/v1/classify{query}", content=picture(1), headers=headers)
        assert (answer.status_code, answer.text) == (200, answer.text)
    finally:
        room.free_images(3, batch=True)


def test_without_a_key_that_is_needed_nobody_learns_what_lies_ahead(
    client: TestClient, pipeline: Pipeline, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = app.state.judge
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/classify", "headers": [], "state": {}}
    scope["query_string"] = b"deadline_ms=0.001"
    monkeypatch.setattr(pipeline.admission, "_pressed_at", math.inf)
    assert judge.refusal(dict(scope)) is not None
    judge._has_key = lambda _: False
    try:
        assert judge.refusal(dict(scope)) is None
    finally:
        judge._has_key = lambda _: True
