"""/v2: the Open Inference Protocol and its extensions, as other people's clients speak them."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.http import tensors
from service.keys import new_key
from service.scheduling.request import RequestState
from service.settings import Settings
from tests.processes import PATIENCE_SECONDS
from tests.service.conftest import PNG, noise
from tests.service.identity import publish_identity

MODEL = "/v2/models/digits-csra-r2"
PIXELS = np.asarray(noise(32, 32))


def infer_body(shape: list[int], data: list[object], **changes: object) -> str:
    tensor = {"name": "image", "datatype": "UINT8", "shape": shape, "data": data, **changes}
    return json.dumps({"id": "7", "inputs": [tensor]})


def binary_body(
    data: bytes, *, shape: list[int], datatype: str = "UINT8", **request: object
) -> tuple[bytes, dict[str, str]]:
    """A request whose tensor follows its JSON, and its headers."""
    tensor = {
        "name": "image",
        "datatype": datatype,
        "shape": shape,
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"inputs": [tensor], **request}).encode()
    return head + data, {"Inference-Header-Content-Length": str(len(head))}


def elements(*images: bytes) -> bytes:
    return b"".join(len(image).to_bytes(4, "little") + image for image in images)


def outputs(answer: Any) -> dict[str, npt.NDArray[np.float32]]:
    """The float tensors of an answer, from JSON or from the bytes behind it."""
    assert answer.status_code == 200, answer.text
    length = answer.headers.get("inference-header-content-length")
    head = json.loads(answer.content if length is None else answer.content[: int(length)])
    at, found = int(length or 0), {}
    for tensor in head["outputs"]:
        assert tensor["datatype"] == "FP32"
        if "data" in tensor:
            values = np.array(tensor["data"], dtype=np.float32)
        else:
            size = tensor["parameters"]["binary_data_size"]
            values = np.frombuffer(answer.content[at : at + size], dtype="<f4")
            at += size
        found[tensor["name"]] = values.reshape(tensor["shape"])
    return found


@pytest.fixture(scope="module")
def expected(client: TestClient) -> dict[str, npt.NDArray[np.float32]]:
    """The answer to two equal images by the plainest request there is."""
    flat: list[object] = [*PIXELS.ravel().tolist()] * 2
    return outputs(client.post(MODEL + "/infer", content=infer_body([2, 32, 32, 3], flat)))


def test_json_tensors_are_answered_like_v1(client: TestClient, expected: dict[str, npt.NDArray[np.float32]]) -> None:
    body = client.post(MODEL + "/infer", content=infer_body([1, 32, 32, 3], PIXELS.tolist())).json()
    assert (body["id"], body["model_name"], body["model_version"]) == ("7", "digits-csra-r2", "1")
    assert expected["logits"].shape == (2, 10)
    best = client.post("/v1/classify?top_k=1", content=PNG).json()["results"][0]["predictions"][0]
    np.testing.assert_allclose(expected["probabilities"].max(axis=1), best["probability"], atol=1e-5)


def test_every_form_of_the_input_gives_the_same_answer(
    client: TestClient, expected: dict[str, npt.NDArray[np.float32]]
) -> None:
    raw = PIXELS.tobytes() * 2
    bodies = {
        "binary": binary_body(raw, shape=[2, 32, 32, 3]),
        "raw": (raw, {"Inference-Header-Content-Length": "0"}),
        "encoded": binary_body(elements(PNG, PNG), shape=[2], datatype="BYTES"),
        "encoded, [n,1]": binary_body(elements(PNG, PNG), shape=[2, 1], datatype="BYTES"),
        "binary outputs": binary_body(raw, shape=[2, 32, 32, 3], parameters={"binary_data_output": True}),
    }
    for name, (body, headers) in bodies.items():
        for encoding, pack in (("", bytes), ("gzip", gzip.compress), ("deflate", zlib.compress)):
            packed = headers | ({"Content-Encoding": encoding} if encoding else {})
            found = outputs(client.post(MODEL + "/infer", content=pack(body), headers=packed))
            for tensor, values in expected.items():
                np.testing.assert_allclose(found[tensor], values, atol=1e-5, err_msg=f"{name} {encoding}")


def test_outputs_are_sent_as_requested(client: TestClient, expected: dict[str, npt.NDArray[np.float32]]) -> None:
    asked = [
        {"name": "probabilities", "parameters": {"classification": 2}},
        {"name": "logits", "parameters": {"binary_data": True}},
    ]
    body, headers = binary_body(PIXELS.tobytes(), shape=[1, 32, 32, 3], outputs=asked)
    answer = client.post(MODEL + "/infer", content=body, headers=headers)
    length = int(answer.headers["inference-header-content-length"])
    classes, logits = json.loads(answer.content[:length])["outputs"]
    assert (classes["name"], classes["datatype"], classes["shape"]) == ("probabilities", "BYTES", [1, 2])
    value, index, label = classes["data"][0].split(":")
    assert int(index) == expected["probabilities"][0].argmax()
    assert float(value) == pytest.approx(expected["probabilities"][0].max(), abs=1e-4)
    assert label
    assert logits["parameters"] == {"binary_data_size": 40}
    np.testing.assert_allclose(np.frombuffer(answer.content[length:], "<f4"), expected["logits"][0], atol=1e-5)


def test_answers_are_compressed_for_clients_that_accept_it(client: TestClient) -> None:
    flat: list[object] = [*PIXELS.ravel().tolist()] * 4
    body = infer_body([4, 32, 32, 3], flat)
    packed = client.post(MODEL + "/infer", content=body, headers={"Accept-Encoding": "gzip"})
    plain = client.post(MODEL + "/infer", content=body, headers={"Accept-Encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.json()["outputs"] == plain.json()["outputs"]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("", ""),
        ("{", ""),
        ("[]", ""),
        (infer_body([1, 32, 32, 3], [0]), "3072"),
        (infer_body([1, 2, 2, 3], [0] * 12), "[n,32,32,3]"),
        (infer_body([0, 32, 32, 3], []), "1 to 4"),
        (infer_body([10**6, 32, 32, 3], []), "1 to 4"),
        (infer_body([1, 32, 32, 3], [1.9] * 3072), "whole numbers"),
        (infer_body([1, 32, 32, 3], [256] * 3072), "0 to 255"),
        (infer_body([1, 32, 32, 3], [0] * 3072, datatype="FP32"), "UINT8"),
        (json.dumps({"inputs": []}), "image"),
    ],
)
def test_errors_are_what_its_clients_parse(client: TestClient, body: str, detail: str) -> None:
    answer = client.post(MODEL + "/infer", content=body)
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    assert detail in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/none/ready", 404),
        ("GET", MODEL + "/versions/2", 404),
        ("GET", MODEL + "/versions/x/config", 404),
        ("POST", MODEL + "/versions/0/infer", 404),
        ("GET", "/v2/nowhere", 404),
        ("GET", MODEL + "/infer", 405),
        ("POST", "/v2/repository/models/none/load", 403),
    ],
)
def test_all_other_errors_have_the_same_form(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])


def test_the_query_of_an_inference_has_no_unknown_names(client: TestClient) -> None:
    body = infer_body([1, 32, 32, 3], PIXELS.tolist())
    assert client.post(MODEL + "/infer?deadline_ms=60000&priority=batch", content=body).status_code == 200
    answer = client.post(MODEL + "/infer?deadline=5", content=body)
    assert (answer.status_code, "did you mean 'deadline_ms'?" in answer.json()["error"]) == (422, True)


def test_unknown_members_and_parameters_are_ignored_as_the_protocol_has_it(client: TestClient) -> None:
    request = json.loads(infer_body([1, 32, 32, 3], PIXELS.tolist(), parameters={"mine": 1}, note="x"))
    request |= {"parameters": {"sequence_id": 7, "mine": [1]}, "extra": {"a": [{}]}}
    assert client.post(MODEL + "/infer", content=json.dumps(request)).status_code == 200


@pytest.mark.parametrize("kind", ["system", "cuda"])
def test_shared_memory_is_refused_with_a_sentence(client: TestClient, kind: str) -> None:
    answer = client.post(f"/v2/{kind}sharedmemory/region/in/register", content=b"{}")
    assert (answer.status_code, "shared memory is not offered" in answer.json()["error"]) == (404, True)


def test_one_image_that_is_something_else_is_told_so(client: TestClient) -> None:
    body, headers = binary_body(elements(b"%PDF-1.7"), shape=[1], datatype="BYTES")
    answer = client.post(MODEL + "/infer", content=body, headers=headers)
    assert (answer.status_code, "a PDF document" in answer.json()["error"]) == (415, True)


def test_a_large_tensor_in_json_is_never_parsed_at_once(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    decoder = tensors._REQUEST

    class Spy:
        def decode(self, text: bytes) -> Any:
            parsed.append(len(text))
            return decoder.decode(text)

    monkeypatch.setattr(tensors, "_REQUEST", Spy())
    flat: list[object] = [*PIXELS.ravel().tolist()] * 4
    assert client.post(MODEL + "/infer", content=infer_body([4, 32, 32, 3], flat)).status_code == 200
    assert client.post(MODEL + "/infer", content=infer_body([1, 32, 32, 3], flat)).status_code == 400
    assert max(parsed) < 200, "of the pixels nothing is left"


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "9" * 30, "٣"])
def test_an_invalid_header_length_is_a_400(client: TestClient, length: str) -> None:
    headers = {b"Inference-Header-Content-Length": length.encode()}
    assert client.post(MODEL + "/infer", content=b"{}", headers=headers).status_code == 400


def test_a_decompression_bomb_is_refused(client: TestClient) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    answer = client.post(MODEL + "/infer", content=bomb, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 413


def test_decompressed_bytes_count_against_the_limit_of_all_bodies(repository: Path) -> None:
    limits = {"max_body_bytes": 300_000, "max_pending_bytes": 300_000}
    with TestClient(create_app(Settings(repository=repository, threads=1, **limits))) as client:  # type: ignore[arg-type]
        pipeline = client.app.state.pipeline  # type: ignore[attr-defined]
        admission, queue = pipeline.admission, pipeline.registry.ready[0].queue
        body, headers = binary_body(elements(bytes(200_000)), shape=[1], datatype="BYTES")
        with admission.admit(RequestState(seconds=60), queue) as other:
            other.hold_bytes(150_000)
            packed = gzip.compress(body)
            answer = client.post(MODEL + "/infer", content=packed, headers=headers | {"Content-Encoding": "gzip"})
            assert answer.status_code == 429
            assert "bytes" in answer.json()["error"]
        assert admission.bytes == 0


def test_one_damaged_image_fails_the_request_and_no_other(client: TestClient) -> None:
    body, headers = binary_body(elements(PNG, PNG[:60]), shape=[2], datatype="BYTES")
    answer = client.post(MODEL + "/infer", content=body, headers=headers)
    assert (answer.status_code, "damaged" in answer.json()["error"]) == (400, True)
    assert outputs(client.post(MODEL + "/infer", content=infer_body([1, 32, 32, 3], PIXELS.tolist())))


@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_a_model_describes_itself(client: TestClient, version: str) -> None:
    metadata = client.get(MODEL + version).json()
    assert metadata["name"] == "digits-csra-r2"
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
    assert [(o["name"], o["datatype"], o["shape"]) for o in metadata["outputs"]] == [
        ("logits", "FP32", [-1, 10]),
        ("probabilities", "FP32", [-1, 10]),
    ]
    config = client.get(MODEL + version + "/config").json()
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (4, [32, 32, 3])
    assert client.get(MODEL + version + "/ready").json() == {"name": "digits-csra-r2", "ready": True}


def test_the_server_describes_itself(client: TestClient) -> None:
    server = client.get("/v2").json()
    assert server["name"] == "stridevit"
    assert {"binary_tensor_data", "classification", "statistics", "model_repository"} <= set(server["extensions"])
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/health/live").json() == {"live": True}


def test_statistics_count_requests_images_and_batches(repository: Path) -> None:
    with TestClient(create_app(Settings(repository=repository, threads=1))) as client:
        for count in (1, 3):
            flat: list[object] = [*PIXELS.ravel().tolist()] * count
            client.post(MODEL + "/infer", content=infer_body([count, 32, 32, 3], flat))
        body, headers = binary_body(elements(PNG[:60]), shape=[1], datatype="BYTES")
        client.post(MODEL + "/infer", content=body, headers=headers)
        (model,) = client.get(MODEL + "/stats").json()["model_stats"]
        assert (model["name"], model["version"], model["inference_count"]) == ("digits-csra-r2", "1", 4)
        stats = model["inference_stats"]
        assert (stats["success"]["count"], stats["fail"]["count"]) == (2, 1)
        # perf_analyzer stops where these differ.
        assert {stats[stage]["count"] for stage in ("queue", "compute_input", "compute_infer", "compute_output")} == {2}
        assert stats["success"]["ns"] >= stats["compute_infer"]["ns"] > 0
        assert model["execution_count"] == sum(batch["compute_infer"]["count"] for batch in model["batch_stats"])
        assert sum(b["batch_size"] * b["compute_infer"]["count"] for b in model["batch_stats"]) == 4
        assert client.get("/v2/models/stats").json()["model_stats"][0]["name"] == "digits-csra-r2"


@pytest.fixture
def administered(tmp_path: Path) -> Iterator[TestClient]:
    """A service whose client holds the admin key."""
    publish_identity(tmp_path, "identity-a")
    publish_identity(tmp_path, "identity-b")
    key, key_hash = new_key()
    settings = Settings(repository=tmp_path, threads=1, admin_key_hash=key_hash)
    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {key}"}) as client:
        yield client


def test_models_are_loaded_and_unloaded_while_serving(administered: TestClient, tmp_path: Path) -> None:
    client = administered

    def index(**body: object) -> list[tuple[str, str, str]]:
        entries = client.post("/v2/repository/index", json=body).json()
        return [(entry["name"], entry["version"], entry["state"]) for entry in entries]

    assert index() == [("identity-a", "1", "READY"), ("identity-b", "1", "READY")]
    assert client.post("/v2/repository/models/identity-a/unload").status_code == 200
    assert index() == [("identity-a", "1", "UNAVAILABLE"), ("identity-b", "1", "READY")]
    assert index(ready=True) == [("identity-b", "1", "READY")]
    assert client.get("/v2/models/identity-a/ready").status_code == 404
    assert client.post("/v2/repository/models/identity-b/unload").status_code == 200
    assert client.get("/v2/health/ready").status_code == 503, "there is nothing left to serve"
    publish_identity(tmp_path, "identity-a")
    assert client.post("/v2/repository/models/identity-a/load", json={}).status_code == 200
    assert ("identity-a", "2", "READY") in index()
    assert client.get("/v2/health/ready").status_code == 200


def test_a_failed_load_says_what_is_wrong(administered: TestClient, tmp_path: Path) -> None:
    broken = publish_identity(tmp_path, "identity-a")
    (broken / "labels.txt").write_text("x\n")
    answer = administered.post("/v2/repository/models/identity-a/load")
    assert (answer.status_code, "labels.txt" in answer.json()["error"]) == (400, True)
    assert str(tmp_path) not in answer.text
    assert administered.get("/v2/models/identity-a/versions/1/ready").status_code == 200, "the old one goes on"
    for name in ("nobody", "..", "%2e%2e%2fidentity-a"):
        assert administered.post(f"/v2/repository/models/{name}/load").status_code == 404
    config = {"parameters": {"config": "{}"}}
    assert administered.post("/v2/repository/models/identity-b/load", json=config).status_code == 400


def test_polling_loads_a_new_version(tmp_path: Path) -> None:
    publish_identity(tmp_path)
    with TestClient(create_app(Settings(repository=tmp_path, threads=1, poll_seconds=0.05))) as client:
        publish_identity(tmp_path)

        async def taken_in() -> None:
            while client.app.state.pipeline.registry.find("identity-a").version != 2:  # type: ignore[attr-defined]  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        assert client.portal
        client.portal.call(lambda: asyncio.wait_for(taken_in(), PATIENCE_SECONDS))
        assert client.get("/v2/models/identity-a").json()["versions"] == ["2"]
