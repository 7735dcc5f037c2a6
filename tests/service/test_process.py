"""The service as its users run it: a process and a socket."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import uvicorn

from service.__main__ import _Server
from tests.processes import PATIENCE_SECONDS, ROOT, serving, wait_until
from tests.service.conftest import PNG


def listens(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def address(repository: Path) -> Iterator[str]:
    """The URL of a service that the tests of this file share."""
    with serving(repository) as (url, process):
        yield url
        assert process.poll() is None


def test_every_odd_file_gets_an_answer_or_a_4xx_and_the_service_lives(address: str, data_dir: Path) -> None:
    files = sorted(file for file in (data_dir / "odd").iterdir() if file.suffix != ".csv")
    assert files
    with httpx.Client(base_url=address, timeout=30) as client:
        statuses: dict[str, int] = {}
        for file in files:
            answer = client.post("/v1/classify", content=file.read_bytes())
            statuses[file.name] = answer.status_code
            assert answer.json(), file.name
        assert client.post("/v1/classify", content=PNG).status_code == 200
    wrong = {name: status for name, status in statuses.items() if status != 200 and not 400 <= status < 500}
    assert wrong == {}
    assert {200, 400, 415, 422} <= set(statuses.values())


def test_every_photo_gets_five_classes(address: str, data_dir: Path) -> None:
    photos = sorted((data_dir / "photos").glob("*.jpg"))
    assert photos
    with httpx.Client(base_url=address, timeout=30) as client:
        for photo in photos:
            answer = client.post("/v1/classify?model=digits-csra-r2", content=photo.read_bytes())
            assert answer.status_code == 200, photo.name
            assert len(answer.json()["results"][0]["predictions"]) == 5


def test_sigterm_finishes_what_was_accepted_and_exits_with_0(repository: Path) -> None:
    released = threading.Event()

    def body() -> Iterator[bytes]:
        yield PNG[:-1]
        assert released.wait(60)
        yield PNG[-1:]

    with serving(repository) as (url, process), ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(httpx.post, url + "/v1/classify", content=body(), timeout=60) for _ in range(6)]
        wait_until(lambda: f"stridevit_pending_bytes {6 * (len(PNG) - 1)}.0" in httpx.get(url + "/metrics").text)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not listens(url))
        released.set()
        assert [answer.result().status_code for answer in answers] == [200] * 6
        assert process.wait(20) == 0


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_service_ends_with_0(repository: Path, end: signal.Signals) -> None:
    with serving(repository) as (_, process):
        process.send_signal(end)
        assert process.wait(20) == 0
        assert process.stderr
        assert "Traceback" not in process.stderr.read()


def test_in_the_shutdown_delay_it_is_not_ready_and_serves_on(repository: Path) -> None:
    with serving(repository, environment={"STRIDEVIT_SHUTDOWN_DELAY_SECONDS": "600"}) as (url, process):
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(url + "/readyz").status_code == 503)
        assert httpx.post(url + "/v1/classify", content=PNG).status_code == 200
        process.kill()


def test_shutdown_reports_not_ready_then_waits_then_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[object] = []

    class Loads:
        def close(self) -> None:
            steps.append("loads ended")

    class Pipeline:
        ready = True
        registry = Loads()

    async def sleep(seconds: float) -> None:
        steps.extend([("ready", pipeline.ready), ("delay", seconds)])

    async def close(*_: object) -> None:
        steps.append("closed")

    pipeline = Pipeline()
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(uvicorn.Server, "shutdown", close)
    server = _Server(uvicorn.Config("no:app"), pipeline, delay_seconds=5)  # type: ignore[arg-type]
    asyncio.run(server.shutdown())
    assert steps == ["loads ended", ("ready", False), ("delay", 5), "closed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repository", "no-such-folder"], "no model repository at no-such-folder: name one with --repository"),
        (["--device", "cuda"], "device 'cuda' is unavailable"),
        (["--models", "no-such-model"], "no version of it"),
        (["--log-level", "loud"], "log_level (from flag --log-level): Input should be 'debug'"),
    ],
)
def test_a_failed_start_ends_with_a_line_that_names_the_fix(
    arguments: list[str], message: str, repository: Path
) -> None:
    command = [sys.executable, "-m", "service", "--repository", str(repository), "--port", "0", *arguments]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_in_use_is_an_error(address: str, repository: Path) -> None:
    command = [sys.executable, "-m", "service", "--repository", str(repository), "--port", address.rsplit(":", 1)[1]]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert ended.returncode != 0
    assert "address already in use" in ended.stderr


def test_answers_do_not_name_the_server_software(address: str) -> None:
    assert "server" not in httpx.get(address + "/healthz").headers


def test_the_service_imports_neither_torch_nor_our_other_packages() -> None:
    forbidden = ["torch", "torchvision", "timm", "onnx", "locust", "training", "export", "loadtests"]
    code = f"import sys; sys.modules.update(dict.fromkeys({forbidden!r})); import service.__main__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_service_runs_in_an_environment_without_torch(repository: Path) -> None:
    python = os.environ.get("STRIDEVIT_SERVICE_PYTHON")
    if not python:
        pytest.skip("needs the service's own environment: run `make test`, or set STRIDEVIT_SERVICE_PYTHON")
    missing = subprocess.run([python, "-c", "import torch"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert "No module named 'torch'" in missing.stderr
    with serving(repository, python=python) as (url, _):
        assert httpx.post(url + "/v1/classify", content=PNG).status_code == 200
