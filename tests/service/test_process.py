"""The service as its users run it: a process and a socket."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.processes import PATIENCE_SECONDS, ROOT, get, post, serving, wait_until
from tests.service.conftest import PNG


def listens(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))).close()
    except OSError:
        return False
    return True


PATIENT = {
    "STRIDEVIT_MIN_UPLOAD_RATE": "0",
    "STRIDEVIT_BODY_TIMEOUT_SECONDS": "400",
    "STRIDEVIT_DEFAULT_DEADLINE_MS": "400000",
    "STRIDEVIT_MAX_DEADLINE_MS": "400000",
    "STRIDEVIT_GRACEFUL_TIMEOUT_SECONDS": "300",
}
"""A service that waits for slow clients."""
FEW_FILES = ["sh", "-c", 'ulimit -n 192; exec "$0" "$@"', sys.executable, "-m", "service"]


def connected(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=PATIENCE_SECONDS)


def gauge(url: str, name: str) -> float:
    """A gauge of the service; -1 if it does not answer."""
    with contextlib.suppress(httpx.TransportError):
        for line in get(url + "/metrics").text.splitlines():
            if line.startswith(f"stridevit_{name} "):
                return float(line.split()[1])
    return -1.0


@pytest.fixture(scope="module")
def address(repository: Path) -> Iterator[str]:
    """The URL of a service that the tests of this file share."""
    with serving(repository) as (url, process):
        yield url
        assert process.poll() is None


def test_every_odd_file_gets_an_answer_or_a_4xx_and_the_service_lives(address: str, data_dir: Path) -> None:
    files = sorted(file for file in (data_dir / "odd").iterdir() if file.suffix != ".csv")
    assert files
    with httpx.Client(base_url=address, timeout=PATIENCE_SECONDS) as client:
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
    with httpx.Client(base_url=address, timeout=PATIENCE_SECONDS) as client:
        for photo in photos:
            answer = client.post("/v1/classify?model=digits-csra-r2", content=photo.read_bytes())
            assert answer.status_code == 200, photo.name
            assert len(answer.json()["results"][0]["predictions"]) == 5


def test_sigterm_finishes_what_was_accepted_and_exits_with_0(repository: Path) -> None:
    released = threading.Event()

    def body() -> Iterator[bytes]:
        yield PNG[:-1]
        assert released.wait(PATIENCE_SECONDS)
        yield PNG[-1:]

    with serving(repository, environment=PATIENT) as (url, process), ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(post, url + "/v1/classify", body()) for _ in range(6)]
        wait_until(lambda: f"stridevit_pending_bytes {6 * (len(PNG) - 1)}.0" in get(url + "/metrics").text)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not listens(url))
        released.set()
        assert [answer.result().status_code for answer in answers] == [200] * 6
        assert process.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_service_ends_with_0(repository: Path, end: signal.Signals) -> None:
    with serving(repository) as (_, process):
        process.send_signal(end)
        assert process.wait(PATIENCE_SECONDS) == 0
        assert process.stderr
        assert "Traceback" not in process.stderr.read()


def test_in_the_shutdown_delay_it_is_not_ready_and_serves_on(repository: Path) -> None:
    with serving(repository, environment={"STRIDEVIT_SHUTDOWN_DELAY_SECONDS": "600"}) as (url, process):
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: get(url + "/readyz").status_code == 503)
        assert post(url + "/v1/classify", PNG).status_code == 200
        process.kill()


def test_a_second_signal_ends_it_at_once(repository: Path) -> None:
    with serving(repository, environment={"STRIDEVIT_SHUTDOWN_DELAY_SECONDS": "600"}) as (url, process):
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: get(url + "/readyz").status_code == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 128 + signal.SIGTERM


def test_clients_that_never_send_or_read_do_not_keep_it_from_ending(repository: Path) -> None:
    environment = {"STRIDEVIT_WRITE_TIMEOUT_SECONDS": "1", "STRIDEVIT_GRACEFUL_TIMEOUT_SECONDS": "300"}
    with serving(repository, environment=environment) as (url, process), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(url)) for _ in range(60)]
        head = b"POST /v1/classify HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(PNG)
        for client in clients[:20]:
            client.setblocking(False)
            with contextlib.suppress(OSError):
                for _ in range(1000):  # until neither side takes more: no answer is ever read
                    client.send(head + PNG)
        for client in clients[20:40]:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n" * 30)
        wait_until(lambda: gauge(url, "pending_images") == 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0


def test_what_does_not_end_in_time_is_aborted_and_the_exit_status_says_so(repository: Path) -> None:
    environment = PATIENT | {"STRIDEVIT_GRACEFUL_TIMEOUT_SECONDS": "1"}
    with serving(repository, environment=environment) as (url, process), connected(url) as client:
        client.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n")
        wait_until(lambda: gauge(url, "open_connections") >= 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 4


def test_idle_connections_leave_descriptors_for_others(repository: Path) -> None:
    with serving(repository, command=FEW_FILES) as (url, process), contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connected(url))
        time.sleep(1.1)  # younger ones might have a request on the way
        for _ in range(300):
            with contextlib.suppress(OSError):
                stack.enter_context(connected(url))
        wait_until(lambda: get(url + "/readyz").status_code == 200)
        wait_until(lambda: post(url + "/v1/classify", PNG).status_code == 200)
        assert process.poll() is None


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "port {port} of 127.0.0.1 is in use: end what listens there, or choose another"),
        ("no.such.host.invalid", "--host no.such.host.invalid: "),
        ("192.0.2.1", "cannot listen on 192.0.2.1, port {port}: "),
    ],
)
def test_an_address_in_use_or_unknown_is_an_error_before_models_are_loaded(
    host: str, expected: str, repository: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "service", "--repository", str(repository), "--host", host, "--port", port]
        ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 1
    assert expected.format(port=port) in ended.stderr
    assert "model ready" not in ended.stdout + ended.stderr


def test_more_connections_than_descriptors_are_an_error_at_start(repository: Path) -> None:
    command = [*FEW_FILES, "--repository", str(repository), "--port", "0", "--max-connections", "500"]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 1
    assert "raise it with `ulimit -n`, or lower max_connections" in ended.stderr


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


def test_answers_do_not_name_the_server_software(address: str) -> None:
    assert "server" not in get(address + "/healthz").headers


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
        assert post(url + "/v1/classify", PNG).status_code == 200
