"""The HTTP API: answers, errors, and that one bad input harms no other."""

import asyncio
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from starlette.types import Message
from structlog.testing import capture_logs

from service.app import create_app
from service.bundle import read_bundle
from service.engine import Engine
from service.http.v1_schemas import Classification
from service.images import decode
from service.manifest import Manifest
from service.scheduling.request import RequestState
from service.settings import Settings
from tests.service.conftest import PNG, encoded, noise


def test_an_image_gets_ranked_labels_and_timings(client: TestClient, repository: Path) -> None:
    answer = client.post("/v1/classify?model=digits-csra-r2&top_k=3", content=PNG)
    assert answer.status_code == 200
    body = answer.json()
    assert list(body) == ["model", "version", "requested", "results", "choice", "timings_ms", "request_id"]
    assert (body["model"], body["version"], body["requested"], body["choice"]) == (
        "digits-csra-r2",
        1,
        body["model"],
        None,
    )
    assert {"read", "decode", "queue", "inference", "total"} == set(body["timings_ms"])
    assert body["timings_ms"]["total"] >= body["timings_ms"]["inference"] > 0

    bundle = read_bundle(repository / "digits-csra-r2" / "1")
    pixels = decode(PNG, bundle.manifest.preprocessing, max_pixels=10_000)
    _, probabilities = Engine(bundle.model_path).run(pixels[None])
    order = np.argsort(-probabilities[0])[:3]
    predictions = body["results"][0]["predictions"]
    assert [p["index"] for p in predictions] == order.tolist()
    assert [p["label"] for p in predictions] == [bundle.labels[index] for index in order]
    np.testing.assert_allclose([p["probability"] for p in predictions], probabilities[0][order], atol=1e-5)


def test_headers_name_the_model_and_the_time_of_each_stage(client: TestClient) -> None:
    answer = client.post("/v1/classify?model=digits-csra-r2&version=1", content=PNG)
    assert answer.headers["x-stridevit-model"] == "digits-csra-r2/1"
    stages = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert {stage: float(ms) for stage, ms in stages.items()} == answer.json()["timings_ms"]
    missing = client.post("/v1/classify?model=digits-csra-r2&version=2", content=PNG)
    assert (missing.status_code, missing.json()["detail"]) == (
        404,
        "model 'digits-csra-r2' has no version 2 here; there are: 1",
    )


def test_without_a_model_the_default_answers(client: TestClient) -> None:
    body = client.post("/v1/classify", content=PNG).json()
    assert (body["model"], body["requested"]) == ("digits-csra-r2", None)
    assert len(body["results"][0]["predictions"]) == 5


@pytest.mark.parametrize(
    "content_type", [None, "image/jpeg", "application/x-www-form-urlencoded", "text/plain; charset=x", "nonsense"]
)
def test_the_content_type_of_a_raw_body_is_ignored(client: TestClient, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert client.post("/v1/classify", content=PNG, headers=headers).status_code == 200


def test_multipart_answers_every_file_in_order(client: TestClient) -> None:
    pictures = [encoded(noise(32, 32, seed=seed)) for seed in range(3)]
    files = [("image", (f"{n}.png", picture, "image/png")) for n, picture in enumerate(pictures)]
    together = client.post("/v1/classify", files=files).json()["results"]
    alone = [client.post("/v1/classify", content=picture).json()["results"][0] for picture in pictures]
    for a, b in zip(together, alone, strict=True):
        assert [p["index"] for p in a["predictions"]] == [p["index"] for p in b["predictions"]]
        probabilities = [[p["probability"] for p in result["predictions"]] for result in (a, b)]
        np.testing.assert_allclose(probabilities[0], probabilities[1], atol=1e-5)


def test_one_bad_image_fails_alone(client: TestClient) -> None:
    files = [("a", ("a.png", PNG)), ("b", ("b.png", b"not an image")), ("c", ("c.png", PNG[:100]))]
    answer = client.post("/v1/classify", files=files)
    assert answer.status_code == 200
    good, text, cut = answer.json()["results"]
    assert good["predictions"]
    assert text["error"]["status"] == 415
    assert cut["error"]["status"] == 400


def test_a_request_fails_only_if_every_image_does(client: TestClient) -> None:
    answer = client.post("/v1/classify", files=[("a", ("a", b"x")), ("b", ("b", PNG[:100]))])
    assert answer.status_code == 415


@pytest.mark.parametrize(
    ("query", "body", "status", "detail"),
    [
        ("", b"", 400, "curl --data-binary"),
        ("", b"plain text", 415, "JPEG, PNG, WEBP"),
        ("", PNG[: len(PNG) // 2], 400, "damaged"),
        ("", encoded(Image.new("1", (1001, 1000))), 422, "1001 × 1000"),
        ("", bytes(200_001), 413, "200,000"),
        ("?model=no-such", PNG, 404, "digits-csra-r2"),
        ("?model=../../etc/passwd", PNG, 404, "no model"),
        ("?top_k=0", PNG, 422, "top_k"),
        ("?top_k=many", PNG, 422, "top_k"),
        ("?version=0", PNG, 422, "version"),
        ("?min_top1=2", PNG, 422, "min_top1"),
        ("?deadline_ms=0", PNG, 422, "deadline_ms"),
        ("?deadline_ms=nan", PNG, 422, "deadline_ms"),
        ("?priority=urgent", PNG, 422, "'interactive' or 'batch'"),
    ],
)
def test_bad_input_is_a_clear_4xx(client: TestClient, query: str, body: bytes, status: int, detail: str) -> None:
    answer = client.post(f"/v1/classify{query}", content=body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert detail in problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]


def test_a_body_of_unstated_length_is_stopped_at_the_limit(client: TestClient) -> None:
    received, answer = 0, []

    async def receive() -> Message:
        nonlocal received
        received += 1
        return {"type": "http.request", "body": bytes(1000), "more_body": received < 1000}

    async def send(message: Message) -> None:
        answer.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/classify",
        "query_string": b"",
        "headers": [(b"transfer-encoding", b"chunked")],
    }
    assert client.portal
    client.portal.call(client.app, scope, receive, send)
    assert answer[0]["status"] == 413
    assert received == 201, "200 chunks fit, and the next one is too much"


def test_a_body_that_does_not_arrive_frees_its_place(repository: Path) -> None:
    async def receive() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    answer: list[Message] = []

    async def send(message: Message) -> None:
        answer.append(message)

    app = create_app(
        Settings(
            repository=repository, max_pending_images=1, max_images_per_request=1, body_timeout_seconds=0.05, threads=1
        )
    )
    scope = {"type": "http", "method": "POST", "path": "/v1/classify", "query_string": b"", "headers": []}
    with TestClient(app) as client:
        assert client.portal
        client.portal.call(app, scope, receive, send)
        assert answer[0]["status"] == 408
        assert client.post("/v1/classify", content=PNG).status_code == 200


def test_an_unexpected_error_is_a_500_whose_id_is_in_the_log(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("service.pipeline.Pipeline._infer", fail)
    with capture_logs() as logs:
        answer = client.post("/v1/classify", content=PNG)
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    assert "planted" not in answer.text
    (entry,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert entry["request_id"] == answer.json()["request_id"]
    assert str(entry["exc_info"]) == "planted"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"x"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\n"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--b--\r\n'),
        ("multipart/form-data; boundary=" + "b" * 500, b"--b--"),
        ("multipart/form-data; boundary=\xff", b"--\xff--"),
    ],
)
def test_malformed_multipart_is_a_400(client: TestClient, content_type: str, body: bytes) -> None:
    answer = client.post("/v1/classify", content=body, headers={b"Content-Type": content_type.encode("latin-1")})
    assert answer.status_code == 400
    assert "multipart" in answer.json()["detail"]


def test_a_field_of_a_multipart_body_cannot_choose_a_slow_codec(client: TestClient) -> None:
    field = "x-" + "a" * 150_000
    head = '--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b; charset=punycode"}
    answer = client.post("/v1/classify", content=f"{head}{field}\r\n--b--\r\n".encode(), headers=headers)
    assert answer.status_code == 400


def test_probes_answer_head_requests(client: TestClient) -> None:
    for path in ("/healthz", "/readyz"):
        assert client.head(path).status_code == 200


def test_too_many_images_are_a_400(client: TestClient) -> None:
    answer = client.post("/v1/classify", files=[("a", (f"{n}.png", PNG)) for n in range(5)])
    assert answer.status_code == 400


def test_a_full_service_says_when_to_retry(repository: Path) -> None:
    app = create_app(Settings(repository=repository, max_pending_images=3, max_images_per_request=3, threads=1))
    two = [("a", ("a.png", PNG)), ("b", ("b.png", PNG))]
    with TestClient(app) as client:
        admission, queue = app.state.pipeline.admission, app.state.pipeline.registry.ready[0].queue
        with admission.admit(RequestState(seconds=60), queue) as other:
            admission.accept(other, queue, 2)
            assert client.post("/v1/classify", content=PNG).status_code == 200, "one place is left"
            busy = client.post("/v1/classify", files=two)
            assert busy.status_code == 429
            assert int(busy.headers["Retry-After"]) >= 1
            assert busy.json()["retry_after_ms"] >= 1
        assert client.post("/v1/classify", files=two).status_code == 200, "the places must be free again"


def test_many_clients_get_their_own_answers(client: TestClient) -> None:
    pictures = [encoded(noise(32, 32, seed=seed)) for seed in range(12)]
    alone = [client.post("/v1/classify", content=picture).json() for picture in pictures]
    barrier = threading.Barrier(12)

    def ask(number: int) -> None:
        barrier.wait(10)
        for _ in range(5):
            together = client.post("/v1/classify", content=pictures[number]).json()
            expected, got = (r["results"][0]["predictions"] for r in (alone[number], together))
            assert [p["index"] for p in got] == [p["index"] for p in expected]

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(12)))


@pytest.mark.parametrize("offered", ["abc-1.2_3:4", "x" * 128])
def test_a_request_id_is_echoed(client: TestClient, offered: str) -> None:
    answer = client.post("/v1/classify", content=PNG, headers={"X-Request-ID": offered})
    assert answer.headers["x-request-id"] == offered
    assert answer.json()["request_id"] == offered


@pytest.mark.parametrize("offered", ["", "with space", "x" * 129, "<script>"])
def test_an_odd_request_id_is_replaced(client: TestClient, offered: str) -> None:
    given = client.get("/healthz", headers={"X-Request-ID": offered}).headers["x-request-id"]
    assert given != offered
    assert len(given) == 32


def test_a_model_shows_its_manifest_and_what_its_batches_cost(client: TestClient, repository: Path) -> None:
    body = client.get("/v1/models/digits-csra-r2").json()
    bundle = read_bundle(repository / "digits-csra-r2" / "1")
    assert Manifest.model_validate(body["manifest"]) == bundle.manifest
    assert body["labels"] == list(bundle.labels)
    assert body["versions"] == [1]
    assert all(ms > 0 for ms in body["batch_ms"].values())
    assert client.get("/v1/models/nobody").status_code == 404


def test_models_are_listed_with_what_they_are(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["models"]
    assert (model["name"], model["state"], model["default"]) == ("digits-csra-r2", "ready", True)
    assert (model["kv_tokens"], model["tokens"], model["variant"]) == (16, 64, "csra-r2")
    assert model["accuracy"]["n"] == 360
    assert "correct" not in model["accuracy"]


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"])
def test_the_other_pages_answer(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 200


def test_the_documentation_needs_no_internet(client: TestClient) -> None:
    page = client.get("/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources
    for source in sources:
        assert source.startswith("/"), source
        assert client.get(source).status_code == 200, source


def test_openapi_describes_the_answer_and_its_errors(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/v1/classify"]["post"]
    assert {"200", "400", "401", "404", "413", "415", "422", "429", "503", "504"} <= set(operation["responses"])
    assert {"image/*", "multipart/form-data"} == set(operation["requestBody"]["content"])
    names = {parameter["name"] for parameter in operation["parameters"]}
    assert names == {
        *("model", "version", "top_k", "min_top1", "deadline_ms", "priority"),
        *("X-Deadline-Ms", "X-Priority", "X-Request-ID"),
    }
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/v1/classify", "/v1/models", "/v1/models/{name}"):
        for method in paths[path].values():
            for status, answer in method["responses"].items():
                (content,) = answer["content"].values()
                if status == "200":
                    assert content["example"], path
                    continue
                for code, example in content["examples"].items():
                    problem = example["value"]
                    assert (problem["type"], problem["status"]) == (f"urn:stridevit:{code}", int(status)), path
    Classification.model_validate(operation["responses"]["200"]["content"]["application/json"]["example"])


def test_openapi_declares_how_to_authorize(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    schemes = schema["components"]["securitySchemes"]
    assert (schemes["bearer"]["scheme"], schemes["X-API-Key"]["name"]) == ("bearer", "X-API-Key")
    for path, operations in schema["paths"].items():
        keys = [key for operation in operations.values() for option in operation.get("security", []) for key in option]
        guarded = path.startswith(("/v1", "/v2")) and "/health/" not in path
        assert set(keys) == ({"bearer", "X-API-Key"} if guarded else set()), path


def test_metrics_count_by_route_and_not_by_path(client: TestClient) -> None:
    client.post("/v1/classify", content=PNG)
    client.get("/made-up-1")
    client.get("/made-up-2")
    text = client.get("/metrics").text
    assert 'stridevit_images_total{model="digits-csra-r2",outcome="ok"}' in text
    assert 'stridevit_requests_total{method="POST",route="/v1/classify",status="200"}' in text
    assert 'stridevit_batch_size_count{model="digits-csra-r2"}' in text
    assert 'route="other"' in text
    assert "made-up" not in text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/classify", 405)])
def test_unknown_routes_are_problems_too(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
