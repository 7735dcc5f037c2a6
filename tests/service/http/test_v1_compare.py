"""POST /v1/compare: one picture, several models, and every answer as it comes."""

import base64
import io
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from service import comparison
from service.app import create_app
from service.bundle import read_bundle
from service.http.server.connections import ConnectionLimits
from service.http.server.server import Server
from service.http.v1_schemas import ComparisonEvent
from service.images import ImageRules, decode
from service.pipeline import Pipeline
from service.scheduling.outputs import Outputs, Pixels
from service.settings import Settings
from tests.processes import PATIENCE_SECONDS, wait_until
from tests.service.conftest import PNG, encoded, noise
from tests.service.faulty import faulty_graph, guilty_picture
from tests.service.http.server.bench import LIMITS
from tests.service.identity import LABELS, picture, publish_identity

NAMES = ["identity-a", "identity-b", "identity-c"]
OTHER_LABELS = tuple(f"other {label}" for label in LABELS)


@pytest.fixture(scope="module")
def models(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models that see 2 × 2 pixels, one of which has other labels, one that fails, and one that sees 32 × 32."""
    folder = tmp_path_factory.mktemp("compare")
    for name, top1 in zip(NAMES, (0.99, 0.5, 0.1), strict=True):
        publish_identity(folder, name, top1=top1)
    publish_identity(folder, "other-labels", top1=0.3, family="other", labels=OTHER_LABELS)
    publish_identity(folder, "other-faulty", top1=0.2, family="other-faulty", graph=faulty_graph("nan"))
    shutil.copytree(repository / "digits-csra-r2", folder / "digits-csra-r2")
    return folder


def settings(models: Path, **more: Any) -> Settings:
    # Neither a test that stands still while it holds the engine, nor a slow machine, ends a request.
    patient = {"default_deadline_ms": 400_000, "max_deadline_ms": 400_000, "hang_min_seconds": 400.0}
    return Settings(repository=models, threads=1, max_consecutive_faults=0, hang_max_seconds=400.0, **(patient | more))


@pytest.fixture(scope="module")
def app(models: Path) -> FastAPI:
    return create_app(settings(models))


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as session:
        yield session


@pytest.fixture
def pipeline(client: TestClient) -> Pipeline:
    found = client.app.state.pipeline  # type: ignore[attr-defined]
    assert isinstance(found, Pipeline)
    return found


def events(client: TestClient, query: str, body: bytes = PNG, **more: Any) -> list[dict[str, Any]]:
    answer = client.post(f"/v1/compare{query}", content=body, **more)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson"), answer.text
    for line in answer.text.splitlines():
        # A line has every member of its schema, of the right type, and no other.
        ComparisonEvent.model_validate_json(line, strict=True, extra="forbid")
    return [json.loads(line) for line in answer.text.splitlines()]


def of_kind(kind: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in found if event["event"] == kind]


def assert_idle(pipeline: Pipeline) -> None:
    """Nobody holds a place, and nothing waits."""
    assert (pipeline.admission.images, pipeline.admission.bytes) == (0, 0)
    for model in pipeline.registry.ready:
        backlog = model.queue.backlog
        assert (len(model.queue), backlog.waiting, backlog.undecoded) == (0, 0, 0)
        assert [(work.small, work.large) for work in backlog.of_class] == [(0, 0), (0, 0)]


def until_idle(pipeline: Pipeline) -> None:
    """Wait until a comparison holds nothing: its body goes last, after the places of its models."""
    wait_until(lambda: (pipeline.admission.images, pipeline.admission.bytes) == (0, 0))
    assert_idle(pipeline)


def test_every_model_says_what_it_says_alone(client: TestClient, pipeline: Pipeline) -> None:
    names = [*NAMES, "digits-csra-r2"]
    found = events(client, f"?models={','.join(names)}&top_k=3", headers={"X-Request-ID": "mine"})
    answers = of_kind("answer", found)
    assert sorted(answer["model"] for answer in answers) == sorted(names)
    for answer in answers:
        alone = client.post(f"/v1/classify?model={answer['model']}&top_k=3", content=PNG).json()
        expected = alone["results"][0]["predictions"]
        assert [p["label"] for p in answer["predictions"]] == [p["label"] for p in expected]
        given, wanted = ([p["probability"] for p in one] for one in (answer["predictions"], expected))
        np.testing.assert_allclose(given, wanted, atol=1e-5)
        assert set(answer["timings_ms"]) == {"read", "decode", "queue", "inference", "total"}
        assert answer["version"] == 1
    for shown in of_kind("picture", found):
        first = min(number for number, event in enumerate(found) if event.get("model") in shown["models"])
        assert found.index(shown) < first
    assert found[-1] == {
        "event": "end",
        "request_id": "mine",
        "agreement": {"model": "identity-a", "of": 2, "agree": 2},
    }
    assert_idle(pipeline)


def test_the_lines_are_described(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    content = document["paths"]["/v1/compare"]["post"]["responses"]["200"]["content"]
    assert {media: part["schema"] for media, part in content.items()} == {
        "application/x-ndjson": {
            "type": "string",
            "contentSchema": {"$ref": "#/components/schemas/ComparisonEvent"},
        }
    }
    for line in content["application/x-ndjson"]["example"].splitlines():
        ComparisonEvent.model_validate_json(line, strict=True, extra="forbid")
    schemas = document["components"]["schemas"]
    kinds = schemas["ComparisonEvent"]["discriminator"]["mapping"]
    assert set(kinds) == {"picture", "answer", "error", "end"}
    assert {reference.rpartition("/")[2] for reference in kinds.values()} <= set(schemas)


def test_the_picture_is_what_the_models_see(client: TestClient, models: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo = encoded(noise(300, 200).convert("CMYK"), "TIFF", exif=exif)
    pictures = of_kind("picture", events(client, "", photo))
    assert {tuple(sorted(shown["models"])) for shown in pictures} == {
        ("digits-csra-r2",),
        ("identity-a", "identity-b", "identity-c", "other-faulty", "other-labels"),
    }
    for shown in pictures:
        name = shown["models"][0]
        seen = Image.open(io.BytesIO(base64.b64decode(shown["png"])))
        preprocessing = read_bundle(models / name / "1").manifest.preprocessing
        np.testing.assert_array_equal(np.asarray(seen), decode(photo, preprocessing, max_pixels=10**6))
        assert (shown["width"], shown["height"]) == seen.size == (preprocessing.crop, preprocessing.crop)


def test_it_is_decoded_once_for_all_that_see_the_same(
    client: TestClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    opening = ImageRules.open

    def noted(*arguments: Any) -> Any:
        opened.append(arguments[2].crop)
        return opening(*arguments)

    monkeypatch.setattr(ImageRules, "open", noted)
    before = decodings(client)
    assert len(of_kind("answer", events(client, "?models=identity,digits-csra-r2"))) == 4
    assert sorted(opened) == [2, pipeline.registry.find("digits-csra-r2").manifest.preprocessing.crop]
    assert decodings(client) == before + 2


def decodings(client: TestClient) -> float:
    """How many images were decoded, by /metrics."""
    rows = client.get("/metrics").text.splitlines()
    return sum(
        float(row.rpartition(" ")[2]) for row in rows if "stage_duration_seconds_count" in row and '"decode"' in row
    )


def test_a_model_that_fails_ends_no_other(client: TestClient) -> None:
    found = events(client, "?models=identity-a,other-faulty,identity-b", guilty_picture(7))
    (failed,) = of_kind("error", found)
    assert (failed["model"], failed["problem"]["code"], failed["problem"]["status"]) == (
        "other-faulty",
        "model-fault",
        500,
    )
    assert {answer["model"] for answer in of_kind("answer", found)} == {"identity-a", "identity-b"}
    assert found[-1]["agreement"] == {"model": "identity-a", "of": 1, "agree": 1}


def test_if_all_fail_the_request_does(client: TestClient, pipeline: Pipeline) -> None:
    answer = client.post("/v1/compare?models=other-faulty", content=guilty_picture(7))
    # The model was given its picture, so that there is one to show.
    assert [json.loads(line)["event"] for line in answer.text.splitlines()] == ["picture", "error", "end"]
    late = client.post("/v1/compare?deadline_ms=0.001", content=PNG)
    assert (late.status_code, late.json()["code"]) == (429, "overloaded")
    assert_idle(pipeline)


def test_models_of_other_labels_are_not_asked_to_agree(client: TestClient) -> None:
    found = events(client, "?models=identity-a,identity-b,other-labels", picture(3))
    assert found[-1]["agreement"] == {"model": "identity-a", "of": 1, "agree": 1}


def test_a_model_for_which_there_is_no_room_is_an_event(models: Path) -> None:
    application = create_app(settings(models, max_pending_images=2, max_images_per_request=1, reserved_fraction=0))
    with TestClient(application) as client:
        found = events(client, "?models=identity")
        assert len(of_kind("answer", found)) == 2
        (refused,) = of_kind("error", found)
        assert (refused["problem"]["code"], refused["problem"]["retry_after_ms"] > 0) == ("overloaded", True)
        assert 'stridevit_rejections_total{reason="images"} 1.0' in client.get("/metrics").text
        assert_idle(application.state.pipeline)


@pytest.mark.parametrize(
    ("query", "status", "detail"),
    [
        ("?models=identity-a,nobody", 404, "no model 'nobody'"),
        ("?models=identity-a,identity-a", 422, "'identity-a' is named twice"),
        ("?models=identity-a,identity", 422, "'identity-a' is named twice, once by its family 'identity'"),
        ("?models=identity-a,,", 422, "a name is empty"),
        ("?models=", 422, "models"),
        ("?models=../../etc/passwd", 404, "no model"),
        ("?models=" + "x" * 2001, 422, "models"),
        ("?model=identity-a", 422, "did you mean 'models'?"),
        ("?top_k=0", 422, "top_k"),
        ("?deadline_ms=nan", 422, "deadline_ms"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_before_anything_is_read(
    client: TestClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, query: str, status: int, detail: str
) -> None:
    monkeypatch.setattr(pipeline.admission, "admit", lambda *_, **__: pytest.fail("it was admitted"))
    answer = client.post(f"/v1/compare{query}", content=PNG)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert detail in answer.json()["detail"]


def test_too_many_models_are_refused_and_without_names_the_best_are_asked(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "MAX_MODELS", 2)
    answer = client.post("/v1/compare?models=identity", content=PNG)
    assert (answer.status_code, answer.json()["detail"]) == (
        422,
        "models: 3 models are named; a comparison takes at most 2",
    )
    asked = {answer["model"] for answer in of_kind("answer", events(client, ""))}
    best = sorted(client.get("/v1/models").json()["models"], key=lambda model: -model["accuracy"]["top1"])[:2]
    assert asked == {model["name"] for model in best}


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"content": b""}, 400, "the body is empty"),
        ({"content": b"plain text"}, 415, "text ('plain text')"),
        ({"content": bytes(100)}, 415, "JPEG, PNG, WEBP"),
        ({"content": PNG[:100]}, 400, "damaged"),
        ({"content": encoded(Image.new("1", (9000, 9000)))}, 422, "9000 × 9000"),
        ({"files": [("a", ("a.png", PNG)), ("b", ("b.png", PNG))]}, 400, "one image, and the body holds 2"),
        ({"files": [("a", ("a.png", PNG))], "data": {"models": "identity"}}, 400, "the form has more than 0 fields"),
        ({"json": {"image": "AAAA", "models": "identity"}}, 422, "unknown member 'models'"),
        ({"json": {"picture": "AAAA"}}, 400, 'write {"image": "<base64>"}; options such as top_k go in the query'),
    ],
)
def test_a_body_that_is_not_one_image_is_one_problem_and_leaves_nothing_behind(
    client: TestClient, pipeline: Pipeline, body: dict[str, Any], status: int, detail: str
) -> None:
    for _ in range(3):
        answer = client.post("/v1/compare", **body)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
        assert detail in answer.json()["detail"]
        assert_idle(pipeline)


# With connections of their own, since a client in this process cannot leave.


class Held:
    """Holds the engine of a model up until it is let go."""

    def __init__(self, pipeline: Pipeline, name: str) -> None:
        self._queue = pipeline.registry.find(name).queue
        self._run = self._queue.run
        self._queue.run = self._wait
        self.at_work, self.free = threading.Event(), threading.Event()

    def _wait(self, images: Pixels, threads: int) -> Outputs:
        self.at_work.set()
        assert self.free.wait(PATIENCE_SECONDS)
        return self._run(images, threads)


@contextmanager
def serving(app: FastAPI) -> Iterator[tuple[socket.socket, Pipeline]]:
    """A connection to the service, which runs on a socket until the block ends."""
    pipeline = app.state.pipeline
    server = Server(
        app,
        pipeline,
        ConnectionLimits(**LIMITS),
        host="127.0.0.1",
        port=0,
        delay_seconds=0,
        graceful_seconds=1000,
        leave=lambda status: pytest.fail(f"it was left with {status}"),
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: bool(server.listeners))
        address = "127.0.0.1", server.listeners[0].socket.getsockname()[1]
        with socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection:
            yield connection, pipeline
    finally:
        server.should_exit = True
        thread.join(PATIENCE_SECONDS)
        server.fuse.cancel()
        assert not thread.is_alive()


def send(connection: socket.socket, query: str, body: bytes = PNG) -> None:
    head = f"POST /v1/compare{query} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)


def next_event(stream: Any) -> dict[str, Any]:
    """The next line of an answer in chunks, of which each is a line."""
    while not (line := stream.readline()).startswith(b"{"):
        assert line
    event: dict[str, Any] = json.loads(line)
    return event


def test_each_answer_is_sent_while_others_are_computed(models: Path) -> None:
    with serving(create_app(settings(models))) as (connection, pipeline):
        held = Held(pipeline, "identity-b")
        send(connection, "?models=identity-a,identity-b")
        with connection.makefile("rb") as stream:
            assert [next_event(stream)["event"] for _ in range(2)] == ["picture", "answer"]
            assert held.at_work.wait(PATIENCE_SECONDS)
            assert pipeline.admission.images == 1, "the place of the model that has answered is free"
            held.free.set()
            assert [next_event(stream)["event"] for _ in range(2)] == ["answer", "end"]


def test_each_model_counts_as_an_image_and_the_body_counts_once(models: Path) -> None:
    with serving(create_app(settings(models))) as (connection, pipeline):
        held = Held(pipeline, "identity-a")
        send(connection, "?models=identity")
        assert held.at_work.wait(PATIENCE_SECONDS)
        assert (pipeline.admission.images, pipeline.admission.bytes) == (3, len(PNG))
        held.free.set()
        with connection.makefile("rb") as stream:
            assert [next_event(stream)["event"] for _ in range(5)][-1] == "end"
        until_idle(pipeline)


@pytest.mark.parametrize("after_events", [0, 1])
def test_a_client_that_hangs_up_frees_its_places_and_nothing_more_is_computed(models: Path, after_events: int) -> None:
    with serving(create_app(settings(models))) as (connection, pipeline):
        held = Held(pipeline, "identity-a")
        send(connection, "?models=identity")
        assert held.at_work.wait(PATIENCE_SECONDS)
        with connection.makefile("rb") as stream:
            for _ in range(after_events):
                assert next_event(stream)["event"] == "picture"
        connection.close()
        # While the engine is still busy with what it had begun.
        until_idle(pipeline)
        counts = dict(_values(pipeline, "rejections", "reason"))
        assert counts == {"client-disconnected": 3}
        held.free.set()
        for model in pipeline.registry.ready:
            # Nobody holds it: it could be unloaded.
            wait_until(model._unused.is_set)
        wait_until(lambda: not pipeline.scheduler.lanes.runs)
    assert {labels["model"] for labels, count in pipeline.metrics.totals("engine_rows") if count} == {"identity-a"}


def _values(pipeline: Pipeline, counter: str, label: str) -> Iterator[tuple[str, float]]:
    return ((labels[label], count) for labels, count in pipeline.metrics.totals(counter) if count)


def test_a_client_that_hangs_up_before_its_picture_is_decoded_has_it_decoded_for_nobody(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, at_work, free = ImageRules.open, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        at_work.set()
        assert free.wait(PATIENCE_SECONDS)
        return opening(*arguments)

    with serving(create_app(settings(models))) as (connection, pipeline):
        monkeypatch.setattr(ImageRules, "open", slow)
        send(connection, "?models=identity")
        assert at_work.wait(PATIENCE_SECONDS)
        assert pipeline.admission.images == 3
        connection.close()
        until_idle(pipeline)
        free.set()
    assert not [count for _, count in pipeline.metrics.totals("engine_rows") if count]
