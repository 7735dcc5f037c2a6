"""KServe's way to start and ask the service, with the arguments of its ServingRuntime; there is no KServe here."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import PATIENT_SERVICE, ROOT, get, post, serving
from tests.service.identity import publish_identity

KSERVE = ROOT / "deploy" / "kserve"


def _document(name: str) -> Any:
    return yaml.safe_load((KSERVE / name).read_text(encoding="utf-8"))


def _arguments(name: str) -> list[str]:
    """Those of the container for an InferenceService of this name, but where the models are, and the port."""
    (container,) = _document("servingruntime.yaml")["spec"]["containers"]
    arguments: list[str] = container["args"]
    assert arguments[:4] == ["--repository", "/mnt/models", "--port", "8080"]
    return [argument.replace("{{.Name}}", name) for argument in arguments[4:]]


def _infer(url: str, name: str) -> Any:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [7] * 12}
    return post(f"{url}/v2/models/{name}/infer", json.dumps({"inputs": [tensor]}).encode())


@pytest.mark.slow
def test_an_inferenceservice_is_asked_by_its_name_whatever_the_bundle_is_called(tmp_path: Path) -> None:
    publish_identity(tmp_path, "identity-a")
    name = _document("inferenceservice.yaml")["metadata"]["name"]
    command = [sys.executable, "-m", "service", *_arguments(name)]
    with serving(tmp_path, command=command, environment=PATIENT_SERVICE) as (url, _):
        assert get(f"{url}/v2/models/{name}/ready").json() == {"name": name, "ready": True}
        assert get(f"{url}/v2/models/{name}").json()["name"] == name
        answer = _infer(url, name)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model_name"] == "identity-a"
        assert answer.json()["outputs"][0]["data"] == [7.0] * 12
        assert _infer(url, "identity-a").status_code == 200
        assert _infer(url, "another").status_code == 404


def test_the_runtime_and_the_service_name_each_other() -> None:
    runtime, service = _document("servingruntime.yaml"), _document("inferenceservice.yaml")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = [one["name"] for one in runtime["spec"]["supportedModelFormats"]]
    assert model["modelFormat"]["name"] in formats
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
