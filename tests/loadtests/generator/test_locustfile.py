"""Locust with our users: the open loop, the closed one, load shapes, two workers; against servers of known latency."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from loadtests.experiment.locust_runner import (
    LOCUSTFILE,
    SHAPES,
    RequestSpec,
    closed_loop,
    open_loop,
    run_locust,
    shaped_loop,
)
from loadtests.experiment.server import Server, ServerError, free_port, running
from loadtests.generator import payload_cache
from loadtests.generator.load_result import PROTOCOLS, LoadResult
from loadtests.generator.payloads import Payload, PayloadError
from loadtests.generator.request_encoder import target
from loadtests.generator.samples import UNSENT, read_samples
from tests.loadtests.servers import Fake, fake_server
from tests.processes import ROOT, serving
from tests.service.conftest import PNG

LOCUST = [sys.executable, "-m", "locust", "-f"]


@pytest.fixture
def ask(tmp_path: Path) -> RequestSpec:
    folder = tmp_path / "payloads"
    folder.mkdir()
    payload_cache.save([Payload(str(number), bytes([number]) * 10, number) for number in range(5)], folder)
    return RequestSpec(payloads=folder, model="m")


def server_of(fake: Fake) -> Server:
    return Server(fake.url, name="the fake")


def late(load: LoadResult, ms: float) -> float:
    return float(np.mean(load.latencies_ms > ms))


def test_the_open_loop_shows_a_stall_that_the_closed_loop_hides(ask: RequestSpec) -> None:
    # One request at a time, 10 ms each, but for one that takes a second: whoever arrives meanwhile must wait as well.
    with fake_server(lambda number: 1.0 if number == 60 else 0.01, serial=True) as fake:
        closed = closed_loop(server_of(fake), ask, connections=1, warmup_seconds=0, seconds=3)
    with fake_server(lambda number: 1.0 if number == 60 else 0.01, serial=True) as fake:
        opened = open_loop(server_of(fake), ask, rate=40, warmup_seconds=0, seconds=3, seed=1)
    # The lone user of the closed loop is held up once; it does not even send what others would have waited with.
    assert late(closed, 200) < 0.02
    # A second's arrivals, of three, and then some until the queue has gone: those that waited 200 ms or more.
    assert 0.2 < late(opened, 200) < 0.5
    assert opened.latencies_ms.max() >= 1000


def test_a_known_latency_is_measured_as_it_is(ask: RequestSpec) -> None:
    with fake_server(lambda _: 0.05) as fake:
        opened = open_loop(server_of(fake), ask, rate=30, warmup_seconds=0.5, seconds=2, seed=1)
        closed = closed_loop(server_of(fake), ask, connections=4, warmup_seconds=0.5, seconds=2)
    for load in (opened, closed):
        assert load.errors == load.unsent_arrivals == 0
        assert load.latencies_ms.min() >= 50
        assert np.median(load.latencies_ms) < 75
    # Four users, 50 ms each: at most 80 a second.
    assert 50 < closed.throughput <= 82
    assert opened.offered_rate == 30
    assert opened.throughput == pytest.approx(30, rel=0.5)


def test_arrivals_wait_for_no_answer_and_are_poisson(ask: RequestSpec) -> None:
    with fake_server(lambda _: 0.5) as fake:
        samples, _ = run_locust(server_of(fake), ask, one_source(rate=100, seconds=4), seconds=4)
    moments = np.sort([sample.due_s for sample in samples])
    gaps = np.diff(moments)
    assert len(samples) == pytest.approx(100 * (moments[-1] - moments[0]), rel=0.2)
    # Exponential gaps vary as much as their mean; a steady beat would not.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.25)
    assert {sample.status for sample in samples} == {200}


def one_source(*, rate: float, seconds: int, seed: int = 0) -> list[str]:
    return ["--users", "1", "--rate-per-user", str(rate), "--run-time", f"{seconds}s", "--seed", str(seed)]


def test_the_same_seed_sends_the_same_images_at_the_same_moments(ask: RequestSpec) -> None:
    runs = []
    for seed in (3, 3, 4):
        with fake_server(lambda _: 0.0) as fake:
            samples, _ = run_locust(server_of(fake), ask, one_source(rate=50, seconds=2, seed=seed), seconds=2)
        samples.sort(key=lambda sample: sample.due_s)
        runs.append((np.diff([sample.due_s for sample in samples[:60]]), [sample.image for sample in samples[:60]]))
        # Moments are random, but images go round in their order.
        assert {body[:1] for body in fake.bodies} == {bytes([number]) for number in range(5)}
    assert runs[0][1] == runs[1][1] == [number % 5 for number in range(60)]
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-4)
    assert runs[0][0] != pytest.approx(runs[2][0], abs=1e-4)


def test_beyond_the_cap_an_arrival_is_not_sent_and_counted(ask: RequestSpec) -> None:
    arguments = [*one_source(rate=50, seconds=2), "--in-flight", "3"]
    with fake_server(lambda _: 1.0) as fake:
        samples, _ = run_locust(server_of(fake), ask, arguments, seconds=2)
        load = open_loop(server_of(fake), ask, rate=600, warmup_seconds=0, seconds=1, seed=0)
    unsent = [sample for sample in samples if sample.status == UNSENT]
    assert len(samples) - len(unsent) <= 3 * 3
    assert len(unsent) > 50
    # 256 under way at most: of about 600 arrivals in a second, most of the second half.
    assert load.unsent_arrivals > 200
    assert np.isinf(load.latencies_ms).sum() == load.unsent_arrivals


def test_answers_that_are_no_answers_count_as_endless(ask: RequestSpec) -> None:
    with fake_server(lambda _: 0.0, status=lambda number: 503 if number % 2 else 200) as fake:
        load = closed_loop(server_of(fake), ask, connections=1, warmup_seconds=0, seconds=1)
    assert load.errors == pytest.approx(len(load.latencies_ms) / 2, abs=1)
    assert np.isinf(load.latencies_ms).sum() == load.errors
    # One that is closed altogether: status 0, and nothing answered.
    dead = closed_loop(
        Server(f"http://127.0.0.1:{free_port()}", name="nobody"), ask, connections=1, warmup_seconds=0, seconds=1
    )
    assert dead.throughput == 0
    assert np.all(np.isinf(dead.latencies_ms))


def test_labels_tell_how_many_answers_were_right(ask: RequestSpec) -> None:
    with fake_server(lambda _: 0.01) as fake:  # it always says 3
        load = closed_loop(server_of(fake), ask, connections=1, warmup_seconds=0, seconds=1)
    assert load.labelled == len(load.latencies_ms)
    assert load.correct == pytest.approx(load.labelled / 5, abs=1)


def test_a_shape_s_steps_and_ramps_become_rates(ask: RequestSpec) -> None:
    with fake_server(lambda _: 0.0) as fake:
        samples, _ = shaped_loop(server_of(fake), ask, rates="20:4,120:4,20>20:2", rate_per_user=5, seconds=10, seed=0)
    begin = min(sample.due_s for sample in samples)
    moments = np.array([sample.due_s - begin for sample in samples])
    # Locust counts its users once a second: the seconds after a change are of neither step.
    assert np.sum((moments > 0.5) & (moments < 3.5)) / 3 == pytest.approx(20, rel=0.5)
    assert np.sum((moments > 5.5) & (moments < 7.5)) / 2 == pytest.approx(120, rel=0.35)
    assert moments.max() < 12


def test_a_server_that_dies_under_load_is_an_error_with_its_last_words(ask: RequestSpec, tmp_path: Path) -> None:
    code = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(3)

HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
    mortal = running(lambda port: [sys.executable, "-c", code, str(port)], name="the mortal", log=tmp_path / "log")
    with mortal as server, pytest.raises(ServerError, match=r"the mortal died under load[^!]*out of luck"):
        closed_loop(server, ask, connections=2, warmup_seconds=0, seconds=20)


def test_tensors_are_sent_by_the_open_inference_protocol_and_judged(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "payloads"
    folder.mkdir()
    with serving(repository) as (url, _):
        path = "/v1/classify?model=digits-csra-r2&top_k=1"
        said = httpx.post(url + path, content=PNG, trust_env=False).json()["results"][0]["predictions"][0]
        payload_cache.save([Payload("one", PNG, said["index"]), Payload("other", PNG, said["label"])], folder)
        for protocol in PROTOCOLS:
            ask = RequestSpec(payloads=folder, model="digits-csra-r2", protocol=protocol)
            load = closed_loop(Server(url, name="digits"), ask, connections=2, warmup_seconds=0, seconds=1)
            assert load.errors == 0
            assert load.correct == load.labelled == len(load.latencies_ms) > 10
            assert set(load.stages_ms) >= {"queue", "inference"}
        with pytest.raises(PayloadError, match=r"nobody does not tell the model's input"):
            target([Payload("one", PNG, 1)], protocol="v2", model="nobody", host=url)
        with pytest.raises(PayloadError, match="broken cannot be decoded"):
            target([Payload("broken", b"x", 1)], protocol="v2", model="digits-csra-r2", host=url)


def test_two_workers_share_the_rate_and_the_master_merges_their_histograms(ask: RequestSpec, tmp_path: Path) -> None:
    samples, port, web = tmp_path / "samples.csv", free_port(), free_port()
    asked = [*ask.arguments(), "--samples", str(samples), "--seed", "7", "--rate-per-user", "20"]
    with fake_server(lambda _: 0.02) as fake:
        # The last reports come within three seconds after the test: the master waits for them.
        ending = ["--autostart", "--autoquit", "6", "--run-time", "5s", "--stop-timeout", "1"]
        bound = ["--master", "--master-bind-port", str(port), "--expect-workers", "2", "--web-port", str(web)]
        users = ["--users", "4", "--spawn-rate", "4", "--host", fake.url]
        master = subprocess.Popen(
            [*LOCUST, str(LOCUSTFILE), *bound, *users, *ending, *asked], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        worker_command = [*LOCUST, str(LOCUSTFILE), "--worker", "--master-port", str(port)]
        workers = [subprocess.Popen(worker_command, cwd=ROOT, stderr=subprocess.DEVNULL) for _ in range(2)]
        try:
            page = None
            while master.poll() is None:
                try:
                    page = httpx.get(f"http://127.0.0.1:{web}/percentiles", trust_env=False).json()
                except httpx.TransportError:
                    time.sleep(0.2)
            _, errors = master.communicate(timeout=30)
            for worker in workers:
                worker.wait(30)
        finally:
            processes: list[subprocess.Popen[Any]] = [master, *workers]
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    rows = [row for number in range(2) for row in read_samples(tmp_path / f"samples-{number}.csv")]
    assert all(len(read_samples(tmp_path / f"samples-{number}.csv")) > 50 for number in range(2))
    # Four sources of 20 a second, whichever worker they are on; each has its own arrivals.
    seconds = max(row.due_s for row in rows) - min(row.due_s for row in rows)
    assert len(rows) / seconds == pytest.approx(80, rel=0.3)
    assert len({round(row.due_s, 5) for row in rows}) > 0.95 * len(rows)
    assert page is not None
    assert page["failed"] == 0
    assert f"{len(rows)} answered, 0 not" in errors
    latencies = [row.latency_ms for row in rows]
    (line,) = [line for line in errors.splitlines() if "answered, 0 not" in line]
    median = float(line.partition("p50 ")[2].partition(",")[0])
    assert median == pytest.approx(np.median(latencies), rel=0.02)


def test_whoever_opens_the_page_cannot_name_a_file(ask: RequestSpec, tmp_path: Path) -> None:
    web, wished = free_port(), tmp_path / "wished.csv"
    with fake_server(lambda _: 0.01) as fake:
        asked = [*ask.arguments(), "--host", fake.url, "--web-port", str(web), "--loop", "closed"]
        process = subprocess.Popen([*LOCUST, str(LOCUSTFILE), *asked], cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            form = {"user_count": 1, "spawn_rate": 1, "host": fake.url, "samples": str(wished), "data": "/etc"}
            deadline = time.monotonic() + 30
            while True:
                try:
                    assert httpx.post(f"http://127.0.0.1:{web}/swarm", data=form, trust_env=False).json()["success"]
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            while len(fake.bodies) < 20:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.terminate()
            process.wait(30)
    assert not wished.exists()
    assert set(fake.bodies) == {bytes([number]) * 10 for number in range(5)}


def test_payloads_that_cannot_be_had_end_locust_with_a_reason() -> None:
    ended = subprocess.run(
        [
            *LOCUST,
            str(LOCUSTFILE),
            "--headless",
            "--host",
            "http://127.0.0.1:1",
            "--run-time",
            "1s",
            "--data",
            "nowhere",
        ],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "is not a folder" in ended.stderr


def test_ctrl_c_keeps_the_samples_so_far(ask: RequestSpec, tmp_path: Path) -> None:
    samples = tmp_path / "samples.csv"
    asked = [*ask.arguments(), "--rates", "50:60", "--samples", str(samples), "--only-summary"]
    with fake_server(lambda _: 0.01) as fake:
        process = subprocess.Popen(
            [*LOCUST, f"{LOCUSTFILE},{SHAPES}", "--headless", "--host", fake.url, *asked],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Where the tests run in the background, SIGINT is ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (no threads here)
        )
        try:
            while len(fake.bodies) < 50:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            process.wait(30)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    assert len(read_samples(samples)) >= 50
    assert json.loads((ask.payloads / "order.json").read_text())
