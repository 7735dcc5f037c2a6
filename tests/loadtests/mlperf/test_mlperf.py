"""MLPerf LoadGen over HTTP: what it writes is read word by word, and a failure is never taken for an answer."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import typer
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner, Result

from loadtests.generator.readers import Label
from loadtests.mlperf import sut
from loadtests.mlperf.cli import mlperf
from loadtests.mlperf.loadgen_logs import Summary, figures, parse_summary, top1, unmet
from loadtests.mlperf.plan import Plan, Task
from loadtests.mlperf.report import notes, write
from loadtests.mlperf.run import MlperfRun
from loadtests.mlperf.sut import RequestFailed, Sut
from tests.loadtests.servers import fake_server
from tests.processes import PATIENCE_SECONDS, ROOT, interruptible, post, serving, still_running
from tests.service.conftest import Clock

app = typer.Typer()
app.command()(mlperf)

INVALID = """\
================================================
MLPerf Results Summary
================================================
SUT name : PySUT
Scenario : Server
Mode     : PerformanceOnly
Completed samples per second    : 46.35
Result is : INVALID
  Performance constraints satisfied : NO
  Min duration satisfied : Yes
Recommendations:
 * Reduce target QPS to improve latency.
Early Stopping Result:
 * Would need to run at least 365 more queries,
 with the run being successful if every additional
 query were under latency.

================================================
Additional Stats
================================================
Scheduled samples per second : 46.41
50.00 percentile latency (ns)   : 2378623
99.00 percentile latency (ns)   : 1780119000

================================================
Test Parameters Used
================================================
samples_per_query : 1
target_latency (ns): 100000000
min_duration (ms): 2000
min_query_count : 64
performance_sample_count : 100

2 warnings encountered. See detailed log.

No errors encountered during test.
"""
ONLY_ACCURACY = "\nNo warnings encountered during test.\n\nNo errors encountered during test.\n"
RULES = {
    "min_duration_s": 600.0,
    "min_query_count": 100,
    "performance_sample_count": 1024,
    "target_latency_ms": 15.0,
}
SUMMARY = parse_summary(INVALID)
SERVER = {
    "scenario": "Server",
    "answered": 90,
    "failed": 0,
    "failures": {},
    "connections": 64,
    "generator_cores": 0.1,
    "loadgen": "6.0.17",
    "model": {},
    "summary": SUMMARY,
    **figures("Server", SUMMARY),
    "unmet": unmet("Server", SUMMARY, RULES),
}
PLAN = Plan(
    model="m",
    repository=Path("models"),
    url=None,
    data=None,
    scenarios=("Server",),
    accuracy=False,
    full=False,
    seconds=2.0,
    target_qps=None,
    load=0.6,
    latency_ms=100.0,
    connections=64,
    service_arguments=(),
)


def results_of(*runs: dict[str, Any]) -> MlperfRun:
    return MlperfRun(plan=PLAN, command="as asked", environment={"cpu": "a"}, runs=list(runs))


def test_the_verdict_and_its_reasons_are_loadgens_own_words(tmp_path: Path) -> None:
    summary = parse_summary(INVALID)
    assert summary.verdict == "INVALID"
    assert summary.reasons == [
        line for line in INVALID.partition("INVALID\n")[2].partition("\n===")[0].splitlines() if line
    ]
    write(results_of(SERVER), tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert INVALID.partition("Result is")[2].partition("\n\n")[0] in page
    assert "| Server | INVALID | Completed samples per second 46.35 | 2.38 | – | 1780.12 | 90 | 0 | 0.10 |" in page
    assert "min_query_count 64, performance_sample_count 100, 64 connections." in page


def test_values_and_settings_are_told_apart_and_nanoseconds_are_given_in_milliseconds() -> None:
    summary = parse_summary(INVALID)
    assert summary.values["Scenario"] == "Server"
    assert summary.number("Completed samples per second") == 46.35
    assert summary.number("99.00 percentile latency (ns)") == pytest.approx(1780.119)
    assert summary.number("Samples per second") is None
    assert summary.parameters == {
        "samples_per_query": "1",
        "target_latency (ns)": "100000000",
        "min_duration (ms)": "2000",
        "min_query_count": "64",
        "performance_sample_count": "100",
    }
    assert summary.remarks == ["2 warnings encountered. See detailed log.", "No errors encountered during test."]
    assert "Server: 2 warnings encountered. See detailed log." in notes(results_of(SERVER))


def test_a_run_for_accuracy_has_no_verdict() -> None:
    assert parse_summary(ONLY_ACCURACY) == Summary(remarks=ONLY_ACCURACY.split("\n")[1:4:2])


def test_what_falls_short_of_mlperfs_own_settings_is_reported() -> None:
    assert SERVER["unmet"] == [
        "2 instead of 600 s at least",
        "64 instead of 100 queries at least",
        "100 instead of 1,024 images in memory",
        "a bound of 100 ms instead of 15 ms",
    ]
    said = "\n".join(notes(results_of(SERVER)))
    assert "no MLPerf result" in said
    assert "2 instead of 600 s" in said
    official = {"target_latency (ns)": "15000000", "min_duration (ms)": "600000", "min_query_count": "100"}
    met = replace(SUMMARY, parameters={**official, "performance_sample_count": "1024"})
    assert unmet("Server", met, RULES) == []


def test_failed_requests_come_first_in_the_report_whatever_the_verdict_is(tmp_path: Path) -> None:
    failing = {**SERVER, "verdict": "VALID", "failed": 10, "failures": {"503: too busy": 7, "404: gone": 3}}
    first, *_ = notes(results_of(failing))
    assert "10 of 100 requests failed" in first
    assert "503: too busy" in first
    write(results_of(failing), tmp_path)
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["failed"] == 10
    assert document["runs"][0]["verdict"] == "VALID"


def test_top1_counts_answered_images_with_a_label_by_index_or_name(tmp_path: Path) -> None:
    def logged(*answers: int | None) -> Path:
        entries = [
            {"seq_id": 9 - image, "qsl_idx": image, "data": "" if answer is None else struct.pack("=i", answer).hex()}
            for image, answer in enumerate(answers)
        ]
        log = tmp_path / "log.json"
        log.write_text(json.dumps(entries[::-1]))
        return log

    answers = logged(1, 0, 1, None, 1, 0)
    labels: list[Label] = [1, 1, "dog", "dog", None, "dog"]
    assert top1(answers, labels, ["cat", "dog"]) == {"correct": 2, "labelled": 4, "top1": 0.5}
    assert top1(answers, labels, []) == {"correct": 1, "labelled": 2, "top1": 0.5}
    assert top1(logged(None), [1], []) == top1(None, [1], []) == {"correct": 0, "labelled": 0, "top1": None}


def run(*arguments: str) -> Result:
    """The command in this process; LoadGen has its own."""
    return CliRunner().invoke(app, arguments)


def served(repository: Path, out: Path, *arguments: str) -> list[str]:
    return ["--repository", str(repository), "--model", "digits-csra-r2", "--out", str(out), *arguments]


@contextmanager
def answering(status: Callable[[int], int]) -> Iterator[str]:
    """A service that answers its nth request to classify with `status(n)`."""
    lock = threading.Lock()
    count = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            nonlocal count
            self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                count += 1
                number = count
            # As the service's, each answer holds something that no other does.
            body = json.dumps({"detail": "no room for more", "request_id": number}).encode()
            self.send_response(status(number))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path != "/readyz":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            return self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def drive(url: str, folder: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    """LoadGen's process alone, in a short SingleStream."""
    images = folder / "images"
    images.mkdir()
    (images / "0").write_bytes(b"no image, and nobody looks")
    plan = replace(PLAN, **{"seconds": 1.0, **changes})
    task = Task(plan=plan, scenario="SingleStream", url=f"{url}/v1/classify", images=images, out=folder)
    command = [sys.executable, "-m", "loadtests.mlperf.sut", msgspec.json.encode(task, enc_hook=str).decode()]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


def failing_after(log: Path, *, every: int) -> Callable[[int], int]:
    """Some requests fail, but none of the warm-up, which has ended when LoadGen writes its log."""
    return lambda number: 503 if number % every == 0 and log.exists() else 200


def test_failed_requests_are_counted_by_the_server_s_message_though_loadgen_is_content(tmp_path: Path) -> None:
    with answering(failing_after(tmp_path / "mlperf_log_detail.txt", every=4)) as url:
        # Ends after the minimum number of queries: LoadGen prepares them from the rate of the warm-up, which may stall.
        ended = drive(url, tmp_path, seconds=0.01)
    assert ended.returncode == 0, ended.stderr
    said = json.loads((tmp_path / "sut.json").read_text())
    assert list(said["failures"]) == ["503: no room for more"]
    failed, answered = said["failures"]["503: no room for more"], said["answered"]
    assert failed + answered >= 100
    assert abs(failed - (failed + answered) / 4) <= 1
    assert parse_summary((tmp_path / "mlperf_log_summary.txt").read_text()).verdict == "VALID"


def test_a_run_with_failed_requests_ends_with_an_error(tmp_path: Path) -> None:
    log = tmp_path / "SingleStream" / "mlperf_log_detail.txt"
    with answering(failing_after(log, every=4)) as url:
        named = ["--url", url, "--model", "m", "--out", str(tmp_path)]
        ended = run(*named, "--scenarios", "SingleStream", "--seconds", "1", "--command", "as asked")
    assert ended.exit_code == 1
    assert "requests failed, which LoadGen cannot know" in ended.output
    assert "503: no room for more" in (tmp_path / "report.md").read_text()
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["failed"] > 10
    (one,) = document["runs"]
    assert f"Result is : {one['verdict']}\n" in (tmp_path / "SingleStream" / "mlperf_log_summary.txt").read_text()
    assert "a family, or unknown to the service" in (tmp_path / "report.md").read_text()


@pytest.mark.long
def test_a_service_that_answers_no_more_ends_the_run(tmp_path: Path) -> None:
    with answering(failing_after(tmp_path / "mlperf_log_detail.txt", every=1)) as url:
        ended = drive(url, tmp_path, seconds=60.0)
    assert ended.returncode == 1
    assert "requests failed in a row, the last one with: 503: no room for more" in ended.stderr
    assert not (tmp_path / "sut.json").exists()


@pytest.mark.long
def test_loadgen_runs_every_scenario_and_its_logs_and_verdicts_are_kept(repository: Path, tmp_path: Path) -> None:
    ended = run(*served(repository, tmp_path, "--seconds", "2", "--latency-ms", "1000", "--command", "as asked"))
    assert ended.exit_code == 0, ended.output
    document = json.loads((tmp_path / "results.json").read_text())
    runs = {one["scenario"]: one for one in document["runs"]}
    assert list(runs) == ["SingleStream", "Offline", "Server"]
    for name, one in runs.items():
        summary = (tmp_path / name / "mlperf_log_summary.txt").read_text()
        assert f"Result is : {one['verdict']}\n" in summary
        assert (tmp_path / name / "mlperf_log_detail.txt").stat().st_size > 1000
        assert one["failed"] == 0
        assert one["answered"] >= 100, name
        assert one["samples_per_second"] > 0, name
        assert one["generator_cores"] > 0, name
        assert one["rules"]["min_duration_s"] == 600
        assert one["summary"]["parameters"]["min_duration (ms)"] == "2000"
        assert "2 instead of 600 s at least" in one["unmet"]
    assert runs["SingleStream"]["connections"] == 1
    assert runs["SingleStream"]["p99_ms"] >= runs["SingleStream"]["p50_ms"] > 0
    assert runs["Offline"]["rules"]["min_query_count"] == 24576
    assert int(runs["Offline"]["summary"]["parameters"]["samples_per_query"]) == runs["Offline"]["answered"]
    asked = float(runs["Server"]["summary"]["parameters"]["target_qps"])
    assert asked == pytest.approx(0.6 * runs["Offline"]["samples_per_second"], rel=1e-3)
    assert runs["Server"]["answered"] >= 1024
    page = (tmp_path / "report.md").read_text()
    assert "as asked" in page
    assert "no MLPerf result" in page
    assert str(tmp_path) not in page
    assert "SingleStream" in ended.output


@pytest.mark.long
def test_accuracy_mode_gives_the_top1_that_the_service_has(repository: Path, tmp_path: Path) -> None:
    digits = load_digits()
    photos = tmp_path / "photos"
    photos.mkdir()
    rows = ["file,label"]
    for position in range(40):
        pixels = (digits.images[position] * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).resize((32, 32)).convert("RGB").save(photos / f"{position:02d}.png")
        rows.append(f"{position:02d}.png,{digits.target[position]}")
    (photos / "labels.csv").write_text("\n".join(rows) + "\n")
    with serving(repository) as (url, _):
        named = ["--url", url, "--model", "digits-csra-r2", "--data", str(photos), "--out", str(tmp_path / "out")]
        ended = run(*named, "--accuracy", "--scenarios", "offline,singlestream")
        correct = 0
        for position in range(40):
            image = (photos / f"{position:02d}.png").read_bytes()
            said = post(f"{url}/v1/classify", image).json()
            correct += said["results"][0]["predictions"][0]["index"] == digits.target[position]
    assert ended.exit_code == 0, ended.output
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [one["scenario"] for one in runs] == ["SingleStream", "Offline"]
    for one in runs:
        assert (one["verdict"], one["labelled"], one["top1"]) == (None, 40, pytest.approx(correct / 40))


@pytest.mark.long
def test_an_unknown_model_ends_with_the_servers_words(repository: Path, tmp_path: Path) -> None:
    with serving(repository) as (url, _):
        ended = run("--url", url, "--model", "nope", "--out", str(tmp_path), "--scenarios", "Offline")
    assert ended.exit_code == 1
    assert "Offline: 404: no model 'nope' here" in ended.output
    assert "Traceback" not in ended.output
    assert not (tmp_path / "results.json").exists()


def test_a_connection_that_was_closed_while_idle_is_opened_anew_but_one_that_breaks_is_a_failure() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_SECONDS)
        closed = threading.Semaphore(0)

        def serve() -> None:
            for reply in (answer, answer, b"", b""):
                accepted, _ = listener.accept()
                with accepted:
                    accepted.recv(1000)
                    accepted.sendall(reply)
                closed.release()

        thread = threading.Thread(target=serve)
        thread.start()
        service = Sut(f"http://127.0.0.1:{listener.getsockname()[1]}/v1/classify?model=m", [], connections=1)
        for _ in range(2):
            assert service.post(b"") == b"ok"
            assert closed.acquire(timeout=PATIENCE_SECONDS)
        with pytest.raises(RequestFailed, match=r"RemoteDisconnected|ConnectionResetError"):
            service.post(b"")
        with pytest.raises(RequestFailed, match=r"RemoteDisconnected|ConnectionResetError"):
            service.post(b"")
        thread.join()


def test_a_warm_up_whose_second_half_stalls_is_rated_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(sut, "time", SimpleNamespace(perf_counter=clock, monotonic=clock))

    def stall(number: int) -> float:
        clock.now += 4.5 if number == 3 else 0.0
        return 0.0

    with fake_server(stall) as fake:
        service = Sut(f"{fake.url}/v1/classify?model=m", [b"image"], connections=1)
        assert service.warm_up(4.0) == pytest.approx(4 / 4.5)


def test_loadgens_process_loads_neither_locust_nor_gevent() -> None:
    code = "import sys, loadtests.mlperf.sut; print(*sys.modules)"
    # A coverage run would load greenlet itself.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    loaded = {name.partition(".")[0] for name in ended.stdout.split()}
    assert "mlperf_loadgen" in loaded
    assert not loaded & {"locust", "gevent", "geventhttpclient", "greenlet", "zmq", "torch", "onnxruntime", "numpy"}

    patched = "import gevent; from loadtests.mlperf.sut import main; main()"
    ended = subprocess.run([sys.executable, "-c", patched], cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "gevent must not be loaded beside LoadGen" in ended.stderr


def started(*arguments: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return interruptible(sys.executable, "-m", "loadtests", "mlperf", *arguments, STRIDEVIT_MAX_BATCH="2")


def wait_for(file: Path, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Until the file is there; then the children of the process."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not file.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.long
def test_a_server_that_dies_under_load_is_an_error_with_the_end_of_its_log(repository: Path, tmp_path: Path) -> None:
    with started(*served(repository, tmp_path, "--seconds", "60", "--scenarios", "SingleStream")) as process:
        family = wait_for(tmp_path / "SingleStream" / "mlperf_log_detail.txt", process)
        (server,) = [child for child in family if "service" in child.cmdline()]
        server.kill()
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    assert "the service for digits-csra-r2 died under load" in errors
    assert "Traceback" not in errors
    assert not still_running(family)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.long
def test_an_interrupted_run_leaves_no_process_and_reports_the_scenarios_that_were_over(
    repository: Path, tmp_path: Path
) -> None:
    with started(*served(repository, tmp_path, "--seconds", "6", "--scenarios", "SingleStream,Offline")) as process:
        family = wait_for(tmp_path / "Offline" / "mlperf_log_detail.txt", process)
        assert len(family) == 2  # the service and LoadGen
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "stopped" in errors
    assert not still_running(family)
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["ended_early"] == "interrupted"
    assert [one["scenario"] for one in document["runs"]] == ["SingleStream"]
    assert "ended early" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repository", "models", "--url", "http://127.0.0.1:9"], "--url names a server that runs already"),
        (["--url", "127.0.0.1:9"], "give the address of a running service"),
        (["--repository", "models", "--scenarios", "Server,Multi"], "SingleStream, Offline, Server"),
        (["--repository", "models", "--accuracy"], "needs labelled images"),
        (["--url", "http://127.0.0.1:9", "--scenarios", "server"], "the server at http://127.0.0.1:9 is not ready"),
    ],
)
def test_what_cannot_be_run_is_a_clear_error(arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no image, and nobody looks")
    ended = run("--model", "m", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *arguments)
    assert ended.exit_code == 1
    assert words in ended.output
    assert "Traceback" not in ended.output
