"""What is served: broken models are left out and say why, and what was asked for must be there."""

import shutil
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.errors import StartError
from service.settings import Settings
from tests.service.conftest import PNG, resum


def test_a_broken_model_is_left_out_and_says_why(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    shutil.copytree(copy / "digits-csra-r2", copy / "digits-broken")
    with TestClient(create_app(Settings(repository=copy, threads=1))) as client:
        listed = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
        assert listed["digits-csra-r2"]["state"] == "ready"
        assert listed["digits-broken"]["state"] == "unavailable"
        assert "names 'digits-csra-r2'" in listed["digits-broken"]["reason"]
        assert str(tmp_path) not in str(listed)
        missing = client.post("/v1/classify?model=digits-broken", content=PNG)
        assert (missing.status_code, "unavailable" in missing.json()["detail"]) == (404, True)
    with pytest.raises(StartError, match="digits-broken"):
        create_app(Settings(repository=copy, models=("digits-broken",), threads=1))
    (copy / "digits-csra-r2" / "1" / "model.onnx").write_bytes(b"x")
    with pytest.raises(StartError, match="no model can be served"):
        create_app(Settings(repository=copy, threads=1))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("golden.npz", b"PK\x03\x04garbage"),
        ("golden.npz", b""),
        ("labels.txt", b"\xff\n" * 10),
        ("model.onnx", b"not a model"),
        ("manifest.json", b"{}"),
    ],
)
def test_a_bundle_broken_with_right_digests_is_left_out_too(
    file: str, content: bytes, repository: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    shutil.copytree(copy / "digits-csra-r2", copy / "other")
    (copy / "digits-csra-r2" / "1" / file).write_bytes(content)
    resum(copy / "digits-csra-r2" / "1")
    manifest = copy / "other" / "1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "digits-csra-r2"', '"name": "other"'))
    resum(copy / "other" / "1")
    with TestClient(create_app(Settings(repository=copy, threads=1))) as client:
        states = {model["name"]: model["state"] for model in client.get("/v1/models").json()["models"]}
        assert states == {"digits-csra-r2": "unavailable", "other": "ready"}


def test_a_default_model_that_is_not_there_is_an_error(repository: Path) -> None:
    with pytest.raises(StartError, match="default_model 'x'"):
        create_app(Settings(repository=repository, default_model="x", threads=1))
