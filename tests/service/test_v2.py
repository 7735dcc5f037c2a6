"""/v2: the core of the Open Inference Protocol."""

import json

import numpy as np
import pytest
from fastapi.testclient import TestClient

from tests.service.conftest import PNG, noise


def infer_body(shape: list[int], data: list[object], **changes: object) -> str:
    tensor = {"name": "image", "datatype": "UINT8", "shape": shape, "data": data, **changes}
    return json.dumps({"id": "7", "inputs": [tensor]})


def test_v2_infers_like_v1(client: TestClient) -> None:
    pixels = np.asarray(noise(32, 32))
    metadata = client.get("/v2/models/digits-csra-r2").json()
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
    flat = pixels.ravel().tolist()
    answer = client.post("/v2/models/digits-csra-r2/infer", content=infer_body([2, 32, 32, 3], flat + flat))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["id"], body["model_name"], body["model_version"]) == ("7", "digits-csra-r2", "1")
    tensors = {tensor["name"]: np.array(tensor["data"]).reshape(tensor["shape"]) for tensor in body["outputs"]}
    assert tensors["logits"].shape == (2, 10)
    best = client.post("/v1/classify?top_k=1", content=PNG).json()["results"][0]["predictions"][0]
    np.testing.assert_allclose(tensors["probabilities"].max(axis=1), best["probability"], atol=1e-5)
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/health/live").json() == {"live": True}


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("", "empty"),
        ("{", "malformed"),
        ("[]", "malformed"),
        (infer_body([1, 32, 32, 3], [0]), "3072 whole numbers"),
        (infer_body([1, 2, 2, 3], [0] * 12), "[n,32,32,3]"),
        (infer_body([0, 32, 32, 3], []), "1 to 4 images"),
        (infer_body([10**6, 32, 32, 3], []), "1 to 4 images"),
        (infer_body([1, 32, 32, 3], [0] * 3073), "3072 whole numbers"),
        (infer_body([1, 32, 32, 3], [1.9] * 3072), "whole numbers"),
        (infer_body([1, 32, 32, 3], [True] * 3072), "whole numbers"),
        (infer_body([1, 32, 32, 3], ["7"] * 3072), "whole numbers"),
        (infer_body([1, 32, 32, 3], [10**30] * 3072), "whole numbers"),
        (json.dumps({"inputs": [], "outputs": [{"name": "secret"}]}), "outputs.0.name"),
        (infer_body([1, 32, 32, 3], [256] * 3072), "0 to 255"),
        (infer_body([1, 32, 32, 3], ["a"] * 3072), "whole numbers"),
        (infer_body([1, 32, 32, 3], [[1], [2, 3]]), "whole numbers"),
        (infer_body([1, 32, 32, 3], [0] * 3072, datatype="FP32"), "UINT8"),
    ],
)
def test_v2_errors_are_what_its_clients_parse(client: TestClient, body: str, detail: str) -> None:
    answer = client.post("/v2/models/digits-csra-r2/infer", content=body)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert detail in answer.json()["error"]
    assert client.get("/v2/models/none").json()["error"].startswith("no model 'none'")
    assert client.get("/v2/nowhere").status_code == 404
    assert list(client.get("/v2/nowhere").json()) == ["error"]
