"""The HTTP API: answers, errors, and that one bad input harms no other."""

import asyncio
import base64
import gzip
import json
import re
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

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
from service.keys import new_key
from service.manifest import Manifest
from service.scheduling.admission import Place
from service.scheduling.request import RequestState
from service.settings import Settings
from tests.processes import PATIENCE_SECONDS
from tests.service.conftest import PNG, encoded, noise
from tests.service.identity import publish_identity


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


def test_a_model_of_unknown_accuracy_answers_whoever_asks_for_none(tmp_path: Path) -> None:
    publish_identity(tmp_path, "identity-random", top1=None)
    with TestClient(create_app(Settings(repository=tmp_path, device="cpu"))) as client:
        assert client.post("/v1/classify?model=identity-random", content=PNG).status_code == 200
        asked = client.post("/v1/classify?model=identity-random&min_top1=0.1", content=PNG)
    assert (asked.status_code, asked.json()["code"]) == (422, "no-suitable-model")
    assert "its accuracy is unknown" in asked.json()["detail"]


def test_without_a_model_the_default_answers(client: TestClient) -> None:
    body = client.post("/v1/classify", content=PNG).json()
    assert (body["model"], body["requested"]) == ("digits-csra-r2", None)
    assert len(body["results"][0]["predictions"]) == 5


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "image/jpeg",
        "application/octet-stream",
        "application/x-www-form-urlencoded",
        "text/plain; charset=x",
        "nonsense",
    ],
)
def test_the_content_type_of_a_raw_body_is_ignored(client: TestClient, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert client.post("/v1/classify", content=PNG, headers=headers).status_code == 200


@pytest.mark.parametrize("content_type", ["application/octet-stream", "image/jpeg", "IMAGE/PNG; x=y"])
@pytest.mark.parametrize("path", ["/v1/classify", "/v1/compare", "/hf/digits-csra-r2"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_json_file_sent_as_a_picture_is_not_read_as_json(
    client: TestClient, path: str, content_type: str, pack: Callable[[bytes], bytes]
) -> None:
    headers = {"Content-Type": content_type, "Content-Encoding": "identity" if pack is bytes else "gzip"}
    for text in (b'{"status": "ok"}', json.dumps({"image": B64, "model": "nobody"}).encode(), b' ["a"]', b'"a"'):
        answer = client.post(path, content=pack(text), headers=headers)
        said = answer.json().get("detail") or answer.json()["error"]
        assert (answer.status_code, said[:16]) == (415, "not an image but"), said
        if text.startswith(b"{"):
            assert "with `Content-Type: application/json`" in said


@pytest.mark.parametrize("content_type", ["", "application/x-www-form-urlencoded", "application/json", "text/plain"])
def test_json_is_told_by_its_beginning_under_any_other_type(client: TestClient, content_type: str) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    body = json.dumps({"image": B64, "top_k": 1})
    assert len(results(client.post("/v1/classify", content=body, headers=headers))[1][0]) == 1


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
        ("", b"plain text", 415, "text ('plain text'): with curl, use --data-binary"),
        ("", bytes(100), 415, "JPEG, PNG, WEBP"),
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
        ("?topk=1", PNG, 422, "unknown query parameter 'topk': did you mean 'top_k'?"),
        ("?threshold=0.5", PNG, 422, "unknown query parameter 'threshold'; there are: deadline_ms, min_top1, model"),
        ("?top_k=1&top_k=2", PNG, 422, "top_k is given twice"),
        ("?min_top1=1", PNG, 422, "model 'digits-csra-r2' does not reach a top-1 of 1"),
        ("?model=digits-csra-r2&min_top1=1", PNG, 422, "model 'digits-csra-r2' does not reach a top-1 of 1"),
        ("?model=digits&min_top1=1", PNG, 422, "no model of family 'digits' reaches a top-1 of 1"),
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


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/docs", "/openapi.json", "/metrics", "/healthz", "/readyz", "/v1/models", "/v1/models/digits-csra-r2"),
        *("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/digits-csra-r2", "/v2/models/stats", "/nowhere"),
    ],
)
def test_head_is_answered_as_get_without_the_body(client: TestClient, path: str) -> None:
    head, got = client.head(path), client.get(path)
    assert (head.status_code, head.headers["content-type"]) == (got.status_code, got.headers["content-type"])
    assert head.content == b""


@pytest.mark.parametrize(("method", "path"), [("GET", "/v2"), ("GET", "/v1/models"), ("POST", "/v1/classify")])
def test_a_slash_at_the_end_of_a_path_changes_nothing(client: TestClient, method: str, path: str) -> None:
    answers = [client.request(method, path + end, content=PNG, follow_redirects=False) for end in ("", "/")]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert client.request(method, path + "//", content=PNG).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/classify", "POST"),
        ("HEAD", "/v1/classify", "POST"),
        ("PUT", "/v1/models", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
        ("GET", "/v2/repository/index", "POST"),
        ("DELETE", "/v2/models/digits-csra-r2", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_the_right_one(client: TestClient, method: str, path: str, allowed: str) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        detail = answer.json().get("detail") or answer.json()["error"]
        assert f"{method} is not offered here, but {' and '.join(allowed.split(', '))}" in detail


def test_a_path_of_tf_serving_that_a_route_matches_is_told_ours_too(client: TestClient) -> None:
    answer = client.post("/v1/models/digits-csra-r2:predict", content=PNG)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert "POST /v1/classify?model=digits-csra-r2" in answer.json()["detail"]


def results(answer: Any) -> tuple[str, list[list[int]]]:
    """The model that answered, and the classes of every image."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["model"], [[p["index"] for p in result["predictions"]] for result in body["results"]]


def as_json(value: object) -> dict[str, Any]:
    return {"content": json.dumps(value), "headers": {"Content-Type": "application/json"}}


B64 = base64.b64encode(PNG).decode()


def test_json_with_base64_is_answered_like_the_bytes(client: TestClient) -> None:
    other = encoded(noise(32, 32, seed=7))
    both = [("a", ("a.png", PNG)), ("b", ("b.png", other))]
    expected = results(client.post("/v1/classify?top_k=2&model=digits-csra-r2", files=both))
    images = [B64, f"data:image/png;base64,{base64.b64encode(other).decode()}"]
    wishes = {"top_k": 2, "model": "digits-csra-r2"}
    for body in (
        {"images": images, **wishes},
        {"instances": [{"b64": images[0]}, {"image_bytes": {"b64": images[1]}}], **wishes},
        {"inputs": images, "parameters": {"top_k": 2}, "model": "digits-csra-r2"},
    ):
        assert results(client.post("/v1/classify", **as_json(body))) == expected
    assert results(client.post("/v1/classify?top_k=2", content=json.dumps({"image": B64})))[1] == expected[1][:1]


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_compressed_bodies_of_any_kind_are_answered(client: TestClient, pack: Callable[[bytes], bytes]) -> None:
    expected = results(client.post("/v1/classify", content=PNG))
    form = client.build_request("POST", "/v1/classify", files={"image": ("a.png", PNG)})
    bodies = (PNG, "image/png"), (json.dumps({"image": B64}).encode(), ""), (form.read(), form.headers["content-type"])
    for body, content_type in bodies:
        encoding = "gzip" if pack is gzip.compress else "deflate"
        headers = {"Content-Encoding": encoding, "Content-Type": content_type}
        assert results(client.post("/v1/classify", content=pack(body), headers=headers)) == expected


def test_a_decompression_bomb_is_a_413(client: TestClient) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    assert client.post("/v1/classify", content=bomb, headers={"Content-Encoding": "gzip"}).status_code == 413
    assert client.app.state.pipeline.admission.bytes == 0  # type: ignore[attr-defined]


def test_what_a_body_asks_for_counts(client: TestClient) -> None:
    def form(query: str = "", **fields: str) -> Any:
        return client.post(f"/v1/classify{query}", files={"image": ("a.png", PNG)}, data=fields)

    def in_json(query: str = "", **members: object) -> Any:
        return client.post(f"/v1/classify{query}", **as_json({"image": B64, **members}))

    send: Callable[..., Any]
    for send in (form, in_json):
        assert len(results(send(top_k="1"))[1][0]) == 1
        assert results(send("?top_k=2", top_k="2", priority="batch", deadline_ms="60000", version="1"))
        for wishes, status, detail in (
            ({"model": "nobody"}, 404, "no model 'nobody'"),
            ({"version": "2"}, 404, "no version 2"),
            ({"min_top1": "1"}, 422, "does not reach a top-1 of 1"),
            ({"top_k": "many"}, 422, "top_k"),
            ({"deadline_ms": "0.001"}, 429, "the deadline leaves 0 ms"),
            ({"topk": "1"}, 422, "'topk': did you mean 'top_k'?"),
        ):
            answer = send(**wishes)
            assert (answer.status_code, detail in answer.json()["detail"]) == (status, True), answer.text
        conflict = send("?top_k=2", top_k="1")
        assert (conflict.status_code, conflict.json()["detail"]) == (
            422,
            "top_k is 2 in the query and 1 in the body: give it once",
        )
    assert client.app.state.pipeline.admission.bytes == 0  # type: ignore[attr-defined]


def test_a_deadline_in_the_body_may_be_later_than_the_default_one(repository: Path) -> None:
    settings = Settings(repository=repository, default_deadline_ms=1, max_deadline_ms=60_000, threads=1)
    with TestClient(create_app(settings)) as client:
        seen = []
        accept = client.app.state.pipeline.admission.accept  # type: ignore[attr-defined]

        def spy(place: Place, *arguments: object, **options: object) -> None:
            seen.append(place.state.deadline - place.state.arrived_at)
            accept(place, *arguments, **options)

        client.app.state.pipeline.admission.accept = spy  # type: ignore[attr-defined]
        body = as_json({"image": B64, "deadline_ms": 1e9})
        headers = {**body.pop("headers"), "X-Deadline-Ms": "50000"}
        client.post("/v1/classify?priority=batch", **body, headers=headers)
    assert seen == [pytest.approx(50.0)]


def test_an_image_that_is_something_else_is_told_so_in_its_place(client: TestClient) -> None:
    files = [("a", ("a.png", PNG)), ("b", ("b", b"%PDF-1.7 ...")), ("c", ("c", gzip.compress(PNG)))]
    good, pdf, packed = client.post("/v1/classify", files=files).json()["results"]
    assert good["predictions"]
    assert pdf["error"]["detail"].startswith("not an image but a PDF document")
    assert packed["error"]["detail"].startswith("not an image but gzip data")
    alone = client.post("/v1/classify", content=gzip.compress(PNG))
    assert (alone.status_code, "Content-Encoding: gzip" in alone.json()["detail"]) == (415, True)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/predict", "POST /v1/classify"),
        ("/invocations", "POST /v1/classify"),
        ("/v1/predict", "POST /v1/classify"),
        ("/ping", "GET /healthz"),
        ("/v1/clasify", "did you mean /v1/classify?"),
    ],
)
def test_paths_of_other_servers_are_told_ours(client: TestClient, path: str, hint: str) -> None:
    answer = client.post(path)
    assert (answer.status_code, answer.json()["code"]) == (404, "not-found")
    assert hint in answer.json()["detail"]


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
        barrier.wait(PATIENCE_SECONDS)
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
        assert not re.match(r"\w+:|//", source), source
        assert client.get(urljoin("/docs", source)).status_code == 200, source


def test_openapi_describes_the_answer_and_its_errors(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/v1/classify"]["post"]
    assert {"200", "400", "401", "404", "413", "415", "422", "429", "503", "504"} <= set(operation["responses"])
    assert {"application/octet-stream", "multipart/form-data", "application/json"} == set(
        operation["requestBody"]["content"]
    )
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
                for code, example in content.get("examples", {}).items():
                    problem = example["value"]
                    assert (problem["type"], problem["status"]) == (f"urn:stridevit:{code}", int(status)), path
    Classification.model_validate(operation["responses"]["200"]["content"]["application/json"]["example"])


def test_openapi_declares_how_to_authorize(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    schemes = schema["components"]["securitySchemes"]
    assert (schemes["bearer"]["scheme"], schemes["X-API-Key"]["name"]) == ("bearer", "X-API-Key")
    for path, operations in schema["paths"].items():
        keys = [key for operation in operations.values() for option in operation.get("security", []) for key in option]
        guarded = path.startswith(("/v1", "/v2", "/hf/")) and "/health/" not in path
        assert set(keys) == ({"bearer", "X-API-Key"} if guarded else set()), path


def test_a_key_is_optional_in_openapi_where_none_is_needed(repository: Path) -> None:
    _, digest = new_key()
    for hashes, optional in (((), True), ((digest,), False)):
        schema = create_app(Settings(repository=repository, threads=1, api_key_hashes=hashes)).openapi()
        assert ({} in schema["paths"]["/v1/classify"]["post"]["security"]) is optional
        assert {} not in schema["paths"]["/v2/repository/models/{name}/load"]["post"]["security"]


def test_openapi_is_complete_for_every_operation(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    names = []
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            names.append(operation["operationId"])
            declared = {entry["name"] for entry in operation.get("parameters", []) if entry["in"] == "path"}
            assert declared == set(re.findall(r"{(\w+)}", path)), path
            wanted = {"application/json"} if path.startswith(("/v2", "/hf/")) else {"application/problem+json"}
            for status, answer in operation["responses"].items():
                if status != "200":
                    assert set(answer["content"]) == wanted, (path, status)
    assert len(names) == len(set(names))
    assert "HTTPValidationError" not in json.dumps(schema)
    assert set(schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
    infer = schema["paths"]["/v2/models/{name}/versions/{version}/infer"]["post"]
    assert set(infer["requestBody"]["content"]) == {"application/json", "application/octet-stream"}


def test_openapi_lists_the_options_of_a_body_as_those_of_the_query(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    query = {
        entry["name"]: entry["schema"]
        for entry in schema["paths"]["/v1/classify"]["post"]["parameters"]
        if entry["in"] == "query"
    }
    for name, images in (("ImageForm", {"image"}), ("ImagesAsBase64", {"image", "images"})):
        body = schema["components"]["schemas"][name]["properties"]
        assert set(body) - images == set(query)
        for option, described in query.items():
            limits = {key: value for key, value in described.items() if key not in ("title", "description")}
            assert body[option] == limits, option


def test_metrics_are_compressed_for_those_who_accept_it_and_have_no_series_of_when_they_were_made(
    client: TestClient,
) -> None:
    client.post("/v1/classify", content=PNG)
    packed, plain = (client.get("/metrics", headers={"Accept-Encoding": coding}) for coding in ("br, gzip", "identity"))
    assert (packed.headers["content-encoding"], packed.headers["vary"]) == ("gzip", "Accept-Encoding")
    refused = client.get("/metrics", headers={"Accept-Encoding": "gzip;q=0, identity"})
    assert "content-encoding" not in refused.headers
    assert "content-encoding" not in plain.headers
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 4
    for text in (packed.text, plain.text):
        assert 'stridevit_images_total{model="digits-csra-r2",outcome="ok"}' in text
        assert "_created" not in text


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
