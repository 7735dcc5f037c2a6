"""/hf answers as Hugging Face's API does: its clients read nothing else."""

import base64
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.service.identity import LABELS, picture, publish_identity

KEY = "a-key-for-clients"
IMAGE = picture(3 | 1 << 8 | 2 << 16)
"""Its logits begin with 3, 1 and 2; the others are 0."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    publish_identity(folder)
    return folder


@pytest.fixture(scope="module")
def client(repository: Path) -> Iterator[TestClient]:
    settings = Settings(repository=repository, threads=1, max_body_bytes=50_000)
    with TestClient(create_app(settings), raise_server_exceptions=False) as session:
        yield session


def as_json(image: bytes = IMAGE, **parameters: Any) -> dict[str, Any]:
    """What InferenceClient sends as soon as it has parameters."""
    return {"inputs": base64.b64encode(image).decode(), "parameters": parameters}


def test_an_images_bytes_are_answered_with_labels_and_scores_best_first(client: TestClient) -> None:
    answer = client.post("/hf/identity-a", content=IMAGE)
    assert answer.status_code == 200
    wanted = client.post("/v1/classify?model=identity-a", content=IMAGE).json()["results"][0]["predictions"]
    assert answer.json() == [{"label": best["label"], "score": best["probability"]} for best in wanted]
    assert [best["label"] for best in answer.json()[:3]] == [LABELS[0], LABELS[2], LABELS[1]]
    assert answer.headers["x-stridevit-model"] == "identity-a/1"


@pytest.mark.parametrize(
    ("function", "scores"),
    [
        ("none", [3.0, 2.0, 1.0]),
        ("sigmoid", [1 / (1 + math.exp(-logit)) for logit in (3, 2, 1)]),
        ("softmax", [math.exp(logit) / (sum(map(math.exp, (3, 2, 1))) + len(LABELS) - 3) for logit in (3, 2, 1)]),
    ],
)
def test_parameters_come_with_base64(function: str, scores: list[float], client: TestClient) -> None:
    answer = client.post("/hf/identity-a", json=as_json(top_k=3, function_to_apply=function))
    assert [best["score"] for best in answer.json()] == pytest.approx(scores, rel=1e-5)


def test_more_classes_than_there_are_is_all_of_them(client: TestClient) -> None:
    assert len(client.post("/hf/identity-a", json=as_json(top_k=1000)).json()) == len(LABELS)


def test_a_family_answers_too_and_the_url_may_hold_a_deadline(client: TestClient) -> None:
    answer = client.post("/hf/identity?deadline_ms=60000&top_k=1", content=IMAGE)
    assert (len(answer.json()), answer.headers["x-stridevit-choice"]) == (1, "most_accurate")
    for late in ("/hf/identity?deadline_ms=0.001", "/hf/identity"):
        headers = {"X-Deadline-Ms": "0.001"} if late == "/hf/identity" else {}
        refused = client.post(late, content=IMAGE, headers=headers)
        assert (refused.status_code in (429, 504), list(refused.json())) == (True, ["error"])


@pytest.mark.parametrize(
    ("path", "content", "status", "said"),
    [
        ("/hf/none", IMAGE, 404, "no model 'none'"),
        ("/hf/identity-a", b"", 400, "the body is empty"),
        ("/hf/identity-a", IMAGE[:45], 400, ""),
        ("/hf/identity-a", b"%PDF-1.7", 415, "a PDF document"),
        ("/hf/identity-a", b"https://example.com/cat.jpg", 415, "the body is a URL"),
        ("/hf/identity-a", bytes(60_000), 413, "the limit is 50,000"),
        ("/hf/identity-a?topk=1", IMAGE, 422, "did you mean 'top_k'?"),
        ("/hf/identity-a?model=identity-a", IMAGE, 422, "unknown query parameter 'model'"),
    ],
)
def test_errors_are_in_the_form_that_clients_show(
    path: str, content: bytes, status: int, said: str, client: TestClient
) -> None:
    answer = client.post(path, content=content)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert said in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"inputs": "not base64!"}, 400, "not base64"),
        ({"inputs": ["QQ==", "QQ=="]}, 400, "one image per request, got 2"),
        ({"inputs": "https://example.com/cat.jpg"}, 415, "the service fetches nothing"),
        (as_json(top_k=0), 422, "top_k"),
        (as_json(function_to_apply="relu"), 422, "function_to_apply"),
        (as_json(threshold=0.5), 422, "JSON: parameters: unknown member 'threshold'; there are: deadline_ms, function"),
        (
            {**as_json(), "parameters": {"image": 1}},
            422,
            "JSON: parameters: unknown member 'image'; there are: deadline",
        ),
        ({**as_json(), "parameters": []}, 400, 'JSON: parameters: not an object: write {"inputs": "<base64>", "para'),
        ({**as_json(), "model": "a"}, 422, "unknown member 'model'; there are: deadline_ms, function_to_apply, inputs"),
        ({"status": 1}, 400, 'got none of them: write {"inputs": "<base64>", "parameters": {"top_k": 5}}'),
    ],
)
def test_errors_in_json_are_too(body: dict[str, Any], status: int, said: str, client: TestClient) -> None:
    answer = client.post("/hf/identity-a", json=body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert said in answer.json()["error"]
    # What the path and the parameters say is no member.
    assert "did you mean 'image'" not in answer.json()["error"]
    assert "such as model" not in answer.json()["error"]


def test_null_in_place_of_parameters_is_none_of_them(client: TestClient) -> None:
    answer = client.post("/hf/identity-a", json={**as_json(), "parameters": None})
    assert (answer.status_code, len(answer.json())) == (200, 5)


def test_the_url_and_the_body_must_not_contradict_each_other(client: TestClient) -> None:
    answer = client.post("/hf/identity-a?top_k=2", json=as_json(top_k=3))
    assert (answer.status_code, answer.json()) == (
        422,
        {"error": "top_k is 2 in the query and 3 in the body: give it once"},
    )


def test_another_method_is_told_the_right_one(client: TestClient) -> None:
    answer = client.get("/hf/identity-a")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "error" in answer.json()


def test_a_token_is_the_key(repository: Path) -> None:
    settings = Settings(repository=repository, threads=1, api_key_hashes=(hashlib.sha256(KEY.encode()).hexdigest(),))
    with TestClient(create_app(settings)) as client:
        without = client.post("/hf/identity-a", content=IMAGE)
        assert (without.status_code, "an API key is needed" in without.json()["error"]) == (401, True)
        wrong = client.post("/hf/identity-a", content=IMAGE, headers={"Authorization": "Bearer hf_other"})
        assert wrong.status_code == 401
        # InferenceClient writes the header's name in lower case.
        assert client.post("/hf/identity-a", content=IMAGE, headers={"authorization": f"Bearer {KEY}"}).is_success


def test_requests_count_under_one_route_and_are_described(client: TestClient) -> None:
    client.post("/hf/identity-a", content=IMAGE)
    assert 'route="/hf/{name}"' in client.get("/metrics").text
    described = client.get("/openapi.json").json()["paths"]["/hf/{name}"]["post"]
    assert [parameter["name"] for parameter in described["parameters"] if parameter["in"] == "path"] == ["name"]
    assert {"200", "400", "401", "404", "413", "415", "422", "429", "503", "504"} <= set(described["responses"])
