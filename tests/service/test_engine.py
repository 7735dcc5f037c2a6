"""Exactly one ONNX Runtime and a device as requested for."""

import subprocess
import sys
from pathlib import Path

import pytest

from service import engine
from service.engine import Engine, require_one_engine, resolve_device
from service.errors import EngineError
from tests.processes import ROOT


@pytest.mark.parametrize(
    ("installed", "message"),
    [(set(), "not installed"), ({"onnxruntime", "onnxruntime-gpu"}, "both installed")],
)
def test_none_or_two_runtimes_are_an_error_that_names_the_extras(
    installed: set[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_installed", installed.__contains__)
    with pytest.raises(EngineError, match=message) as caught:
        require_one_engine()
    assert "stridevit[cpu]" in str(caught.value)
    assert "stridevit[gpu]" in str(caught.value)
    code = (
        f"from service import engine; engine._installed = {installed!r}.__contains__;"
        "from service.__main__ import app; app(['--repository', 'models'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert message in ended.stderr
    assert "pip install 'stridevit[cpu]'" in ended.stderr, "brackets must reach the terminal"


def test_the_one_that_is_installed_is_found() -> None:
    assert require_one_engine() in ("onnxruntime", "onnxruntime-gpu")


@pytest.mark.parametrize("requested", ["cuda", "cuda:1", "tensorrt"])
def test_an_unavailable_device_is_an_error(requested: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=f"'{requested}' is unavailable"):
        resolve_device(requested)


@pytest.mark.parametrize("requested", ["gpu", "cuda:x", "", "cpu2"])
def test_an_unknown_device_is_an_error_that_lists_the_known_ones(requested: str) -> None:
    with pytest.raises(EngineError, match="use auto, cpu, cuda, cuda:N or tensorrt"):
        resolve_device(requested)


def test_the_runtime_s_telemetry_is_off(repository: Path) -> None:
    code = (
        "import os, sys; os.environ.pop('ORT_DISABLE_TELEMETRY', None); from service.engine import Engine;"
        "Engine(sys.argv[1]); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    model = repository / "digits-csra-r2" / "1" / "model.onnx"
    ended = subprocess.run([sys.executable, "-c", code, model], cwd=ROOT, check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == "1"


def test_a_file_that_is_not_a_model_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(EngineError, match="cannot load the model"):
        Engine(path)
