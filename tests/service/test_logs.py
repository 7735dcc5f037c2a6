"""Logging that neither blocks nor fails: whatever becomes of standard error, the service starts, answers and ends."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.logs import LineQueue
from tests.processes import PATIENCE_SECONDS, ROOT, get, post, serving, wait_until
from tests.service.identity import picture, publish_identity

NO_STDERR = {
    "full": 'exec "$0" "$@" 2>/dev/full',
    "closed": 'exec "$0" "$@" 2>&-',
    "without a reader": 'exec "$0" "$@" 2> >(exec true)',
}
"""How the service is started, by what is the matter with its standard error."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that is loaded at once."""
    folder = tmp_path_factory.mktemp("models")
    publish_identity(folder)
    return folder


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of the smallest size: its end to read and its end to write."""
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:  # a test closed it
            continue


def queue_to(fd: int, max_bytes: int = 1 << 20) -> LineQueue:
    return LineQueue(fd, max_bytes=max_bytes, report=lambda dropped: f"dropped {dropped}")


def dropped_lines(url: str) -> int:
    """The metric."""
    text = get(url + "/metrics").text
    return int(float(text.split("\nstridevit_log_lines_dropped_total ")[1].split("\n")[0]))


def send(url: str, requests: int) -> None:
    """Requests whose log lines have more than 200 bytes, on one connection."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE_SECONDS)
    for number in range(requests):
        connection.request("GET", "/healthz", headers={"X-Request-ID": f"{number:0128}"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
    connection.close()


def test_lines_arrive_whole_and_in_order(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    queue = queue_to(writer)
    sent = [f"line {number} ü" for number in range(20_000)]
    received: list[bytes] = []

    def read() -> None:
        with open(reader, "rb", closefd=False) as stream:
            received.extend(stream)

    reading = threading.Thread(target=read)
    reading.start()
    for line in sent:
        queue.put(line)
    assert queue.close(PATIENCE_SECONDS)
    os.close(writer)
    reading.join()
    assert [line.decode().rstrip("\n") for line in received] == sent
    assert queue.dropped == 0


def test_a_reader_that_stops_costs_lines_and_is_told_how_many_once_it_reads_again(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    queue = queue_to(writer, max_bytes=10_000)
    for number in range(10_000):
        queue.put(f"line {number:05}")
    lost = queue.dropped
    assert 0 < lost < 10_000
    received: list[bytes] = []

    def read() -> None:
        with open(reader, "rb", closefd=False) as stream:
            received.extend(stream)

    reading = threading.Thread(target=read)
    reading.start()
    assert queue.flush(PATIENCE_SECONDS)
    queue.put("after")
    assert queue.close(PATIENCE_SECONDS)
    os.close(writer)
    reading.join()
    reports = [int(line.split()[1]) for line in received if line.startswith(b"dropped")]
    assert sum(reports) == lost, "each lost line is reported once"
    assert len(received) == 10_000 - lost + len(reports) + 1
    assert received.index(b"after\n") >= len(received) - 2


def test_the_end_does_not_wait_longer_than_its_limit_for_a_reader(pipe: tuple[int, int]) -> None:
    _, writer = pipe
    queue = queue_to(writer)
    for _ in range(10_000):
        queue.put("x" * 100)
    assert not queue.flush(0.01)
    assert not queue.close(0.01)
    queue.put("too late")
    assert queue.dropped > 0


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    with Path("/dev/full").open("wb") as full:
        queue = queue_to(full.fileno())
        for _ in range(100):
            queue.put("lost")
        assert queue.close(PATIENCE_SECONDS)
        assert queue.dropped == 100


def test_a_line_cut_by_a_full_disk_does_not_join_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    room = [14, 0, 1000]

    def write(_: int, data: memoryview) -> int:
        allowed = room.pop(0)
        if not allowed:
            raise OSError(28, "No space left on device")
        written.append(bytes(data[:allowed]))
        return len(written[-1])

    monkeypatch.setattr(os, "write", write)
    queue = queue_to(99)
    queue.put("0123456789abcdef")
    wait_until(lambda: queue.dropped == 1)
    room.append(1000)
    queue.put("next")
    assert queue.close(PATIENCE_SECONDS)
    assert b"".join(written).split(b"\n") == [b"0123456789abcd", b"next", b"dropped 1", b""]


def test_a_descriptor_that_does_not_block_loses_nothing(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.set_blocking(writer, False)
    queue = queue_to(writer)
    for _ in range(5000):
        queue.put("x" * 99)
    received = 0
    while received < 500_000:
        received += len(os.read(reader, 65536))
    assert queue.close(PATIENCE_SECONDS)
    assert queue.dropped == 0


def test_a_reader_that_stops_keeps_neither_requests_nor_the_end_waiting(small: Path) -> None:
    """`serving` reads nothing of standard error while the service runs."""
    with serving(small, environment={"STRIDEVIT_LOG_REQUESTS": "all"}) as (url, process):
        send(url, 6000)
        assert post(url + "/v1/classify", picture(1)).status_code == 200
        assert dropped_lines(url) > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0


def test_a_reader_that_comes_back_gets_json_lines_and_the_number_of_those_it_missed(small: Path) -> None:
    environment = {"STRIDEVIT_LOG_REQUESTS": "all", "STRIDEVIT_LOG_BUFFER_BYTES": "50000"}
    with serving(small, environment=environment) as (url, process):
        send(url, 1000)
        lost = dropped_lines(url)
        assert lost > 0
        lines: list[dict[str, Any]] = []
        assert process.stderr
        stream = process.stderr
        reading = threading.Thread(target=lambda: lines.extend(map(json.loads, stream)))
        reading.start()
        wait_until(lambda: sum(line.get("dropped", 0) for line in list(lines)) >= lost, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
        reading.join()
    assert any("Finished server process" in line["event"] for line in lines), "the end is logged too"


@pytest.mark.parametrize("state", NO_STDERR)
def test_without_a_place_for_its_log_the_service_starts_answers_and_ends(state: str, small: Path) -> None:
    command = ["bash", "-c", NO_STDERR[state], sys.executable, "-m", "service"]
    environment = {"STRIDEVIT_LOG_REQUESTS": "all", "STRIDEVIT_MAX_BACTH": "misspelt, which is a warning"}
    with serving(small, command=command, environment=environment) as (url, process):
        send(url, 20)
        assert post(url + "/v1/classify", b"no image").status_code == 415
        assert post(url + "/v1/classify", picture(1)).status_code == 200
        if state != "closed":
            wait_until(lambda: dropped_lines(url) >= 20, process)
        assert not str(Path(f"/proc/{process.pid}/fd/2").readlink()).startswith("socket"), (
            "no connection takes its number"
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0


LOGGING = """
import ctypes, logging, os, sys, threading, warnings
import structlog
from service.logs import Logs
with Logs(flush_seconds={flush}):
    {body}
"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("structlog.get_logger().info('own', a=1)", {"event": "own", "a": 1, "level": "info"}),
        ("logging.getLogger('uvicorn.error').info('%d', 5)", {"event": "5", "level": "info"}),
        ("logging.getLogger('x').info('%d', 'five')", {"event": "'%d'", "level": "error"}),
        ("warnings.warn('odd\\ninput')", {"level": "warning"}),
        ("print('printed', file=sys.stderr)", {"event": "printed", "logger": "stderr"}),
        ("ctypes.CDLL(None).dprintf(2, b'native\\n')", {"event": "native", "logger": "stderr"}),
        ("os.system('echo child >&2')", {"event": "child", "logger": "stderr"}),
        ("t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()", {"level": "error"}),
        ("structlog.get_logger().info('\\udc80')", {"event": "\udc80"}),
    ],
)
def test_whatever_is_said_is_one_json_line(body: str, expected: dict[str, object]) -> None:
    command = [sys.executable, "-c", LOGGING.format(body=body, flush=PATIENCE_SECONDS)]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    (line,) = ended.stderr.splitlines()
    values = json.loads(line)
    assert values.items() >= expected.items()
    assert {"event", "level", "timestamp"} <= values.keys()


def test_native_code_is_not_stopped_by_a_reader_that_stops() -> None:
    """A child of the shell: it says on standard output that it has written everything."""
    body = "[ctypes.CDLL(None).dprintf(2, b'x' * 999 + b'\\n') for _ in range(5000)]; print('done')"
    with subprocess.Popen(
        [sys.executable, "-c", LOGGING.format(body=body, flush=0.1)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.wait(PATIENCE_SECONDS) == 0
        assert process.stdout
        assert process.stdout.read() == "done\n"


def test_logging_shutdown_waits_for_the_lines_so_that_a_hard_exit_keeps_them() -> None:
    body = "[structlog.get_logger().info('x') for _ in range(5000)]; logging.shutdown(); os._exit(70)"
    command = [sys.executable, "-c", LOGGING.format(body=body, flush=PATIENCE_SECONDS)]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 70
    assert len(ended.stderr.splitlines()) == 5000


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--repository", "no-such-folder"], 1, "no model repository at no-such-folder"),
        (["--port", "many"], 2, "port (from flag --port): Input should be a valid integer"),
        (["--config", "no-such-file"], 2, "cannot read the settings file no-such-file"),
        (["--host", "192.0.2.1"], 1, "cannot listen on 192.0.2.1"),
    ],
)
def test_an_error_at_start_is_one_log_line(arguments: list[str], code: int, reason: str, small: Path) -> None:
    command = [sys.executable, "-m", "service", "--repository", str(small), "--port", "0", *arguments]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert ended.returncode == code
    errors = [line for line in map(json.loads, ended.stderr.splitlines()) if line["level"] == "error"]
    (error,) = errors
    assert reason in error["event"]


def test_a_fault_that_nobody_foresaw_is_one_log_line_with_its_traceback() -> None:
    code = (
        "import service.__main__, service.running\n"
        "def create_app(settings): raise RuntimeError('a fault\\nof two lines')\n"
        "service.running.create_app = create_app\n"
        "service.__main__.app(prog_name='service')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "RuntimeError: a fault\nof two lines" in json.loads(line)["exception"]
