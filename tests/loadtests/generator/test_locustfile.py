"""Locust with our users, in processes of its own, against servers whose answers are known.

On a busy machine everything may take long: what is asserted is which requests are sent, in which order, and what
belongs together, never when.
"""

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from loadtests.experiment.load_runner import LOCUSTFILE, apply_load, run_locust
from loadtests.experiment.model import Load
from loadtests.experiment.server import Server, ServerError, free_port, running
from loadtests.generator import payload_cache
from loadtests.generator.load_result import window
from loadtests.generator.rates import poisson_arrivals
from loadtests.generator.readers import Payload
from loadtests.generator.samples import UNSENT, Sample, as_samples, read_samples
from tests.loadtests.servers import Fake, fake_server
from tests.processes import PATIENCE_SECONDS, ROOT, interruptible

LOCUST = [sys.executable, "-m", "locust", "-f"]


@pytest.fixture
def ask(tmp_path: Path) -> list[str]:
    """Five payloads, of class 0 to 4, as arguments."""
    folder = tmp_path / "payloads"
    folder.mkdir()
    payload_cache.save([Payload(str(number), bytes([number]) * 10, number) for number in range(5)], folder)
    return ["--data", str(folder), "--model", "m"]


def sent(fake: Fake, ask: list[str], *arguments: str) -> list[Sample]:
    """Run Locust to its end: the samples in the order in which they were due."""
    samples, _ = run_locust(Server(fake.url, name="the fake"), [*ask, *arguments], seconds=5)
    return [Sample(*row) for row in np.sort(samples, order="due_s")]


def open_loop(*, rate: float, seconds: float, seed: int = 0) -> list[str]:
    return ["--users", "1", "--rate-per-user", str(rate), "--seconds", str(seconds), "--seed", str(seed)]


def wait_for_requests(fake: Fake, process: subprocess.Popen[str], count: int) -> None:
    while len(fake.bodies) < count:
        assert process.poll() is None
        time.sleep(0.05)


def test_the_open_loop_sends_exactly_the_arrivals_of_its_seed(ask: list[str]) -> None:
    with fake_server(lambda _: 0.0) as fake:
        samples = sent(fake, ask, *open_loop(rate=50, seconds=2, seed=3))
    arrivals = poisson_arrivals(50, seed="3/0/0")
    expected = list(itertools.takewhile(lambda due: due < 2, arrivals))
    assert 50 < len(samples) == len(expected)
    offsets = np.array([sample.due_s for sample in samples]) - samples[0].due_s
    assert offsets == pytest.approx(np.array(expected) - expected[0], abs=1e-5)
    assert [sample.image for sample in samples] == [number % 5 for number in range(len(samples))]
    assert {body[:1] for body in fake.bodies} == {bytes([number]) for number in range(5)}
    assert {sample.status for sample in samples} == {200}


def test_a_load_s_result_is_that_of_its_window(ask: list[str]) -> None:
    load = Load(name="load", rate=30)
    with fake_server(lambda _: 0.02) as fake:
        result = apply_load(Server(fake.url, name="fake"), ask, load, warmup_seconds=0.5, seconds=1, seed=1)
    arrivals = poisson_arrivals(30, seed="1/0/0")
    begin = next(arrivals) + 0.5
    due = [moment for moment in itertools.islice(arrivals, 200) if begin <= moment < begin + 1]
    assert (result.mode, result.offered_rate, result.connections) == ("open", 30, None)
    assert result.arrivals == result.answered == len(result.latencies_ms) == len(due)
    assert result.errors == result.unsent_arrivals == 0
    assert result.latencies_ms.min() >= 20
    assert result.labelled == len(due)
    assert 0 < result.correct < result.labelled


def test_beyond_the_cap_an_arrival_is_not_sent_and_counted(ask: list[str]) -> None:
    with fake_server(lambda _: 0.5) as fake:
        samples = sent(fake, ask, *open_loop(rate=200, seconds=2), "--in-flight", "3")
    arrivals = list(itertools.takewhile(lambda due: due < 2, poisson_arrivals(200, seed="0/0/0")))
    unsent = [sample for sample in samples if sample.status == UNSENT]
    assert len(samples) == len(arrivals)
    assert len(unsent) == len(arrivals) - len(fake.bodies) > 0
    assert fake.max_in_flight <= 3


def test_the_open_loop_shows_a_stall_that_the_closed_loop_hides(ask: list[str]) -> None:
    held: dict[int, float] = {}
    stall = 0

    def stalled_samples(others: int, *arguments: str) -> list[Sample]:
        """Samples held up by a serial server whose first request stalls until `others` wait behind it."""
        held.clear()
        received: dict[int, float] = {}
        waiting = range(stall, stall + others + 1)

        def seconds(number: int) -> float:
            while number == stall and len(fake.bodies) <= stall + others:
                received.update({seen: received.get(seen, time.monotonic()) for seen in range(len(fake.bodies))})
                time.sleep(0.01)
            held.update({number: (time.monotonic() - received.get(number, time.monotonic())) * 1000})
            return 0.0

        with fake_server(seconds, serial=True, model=lambda n: f"held/{n}" if n in waiting else "") as fake:
            return [sample for sample in sent(fake, ask, *arguments) if sample.model]

    closed = stalled_samples(0, "--loop", "closed", "--users", "1", "--seconds", "1")
    assert len(closed) == 1
    opened = stalled_samples(20, *open_loop(rate=100, seconds=2))
    assert len(opened) == 21
    for sample in opened:
        # The wait at the server, counted by itself, is part of the latency.
        assert sample.latency_ms >= held[int(sample.model.partition("/")[2])]


def test_the_closed_loop_waits_for_each_answer_and_judges_it(ask: list[str]) -> None:
    # The fake always says class 3; every third connection breaks, every third answer is an error.
    with fake_server(lambda _: 0.01, status=lambda number: (200, 503, 0)[number % 3]) as fake:
        samples = sent(fake, ask, "--loop", "closed", "--users", "1", "--seconds", "4")
    assert len(samples) == len(fake.bodies) >= 3
    assert fake.max_in_flight == 1
    for number, sample in enumerate(samples):
        assert (sample.image, sample.status) == (number % 5, (200, 503, 0)[number % 3])
        assert sample.correct == pytest.approx(
            float(sample.image == 3) if sample.status == 200 else np.nan, nan_ok=True
        )
        assert sample.latency_ms >= 10
    found = window(as_samples(samples), begin=0, seconds=1e12, connections=1)
    assert found.errors == np.isinf(found.latencies_ms).sum() == sum(sample.status != 200 for sample in samples)
    assert found.labelled == sum(sample.status == 200 for sample in samples)


def test_rates_become_numbers_of_users() -> None:
    code = """
from types import SimpleNamespace
from loadtests.generator.locustfile import Rates, parse_rates

options = SimpleNamespace(rate_per_user=5)
environment = SimpleNamespace(parsed_options=options, runner=SimpleNamespace(user_count=0))
rates = Rates(parse_rates("20:4,120:4,100>200:10"), environment)
for seconds in (0, 3.9, 4, 13, 18):
    rates.get_run_time = lambda: seconds
    print(rates.tick())
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert ended.stdout.splitlines() == ["(4, 4)", "(4, 4)", "(24, 24)", "(30, 30)", "None"]


def test_a_server_that_dies_under_load_is_an_error_with_the_end_of_its_log(ask: list[str], tmp_path: Path) -> None:
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
    mortal = running([sys.executable, "-c", code], name="the mortal", log=tmp_path / "log")
    with mortal as server, pytest.raises(ServerError, match=r"the mortal died under load[^!]*out of luck"):
        apply_load(server, ask, Load(name="load", connections=2), warmup_seconds=0, seconds=20, seed=0)


@pytest.mark.slow
def test_two_workers_share_the_rate_and_the_master_merges_their_histograms(ask: list[str], tmp_path: Path) -> None:
    samples, port, web = tmp_path / "samples.csv", free_port(), free_port()
    options = [*ask, "--samples", str(samples), "--seed", "7", "--rate-per-user", "20"]
    # The last reports come within three seconds after the test: the master waits for them.
    ending = ["--autostart", "--autoquit", "6", "--run-time", "5s", "--stop-timeout", "1"]
    bound = ["--master", "--master-bind-port", str(port), "--expect-workers", "2", "--web-port", str(web)]
    worker = [str(LOCUSTFILE), "--worker", "--master-port", str(port)]
    with fake_server(lambda _: 0.02) as fake:
        users = ["--users", "4", "--spawn-rate", "4", "--host", fake.url]
        with (
            interruptible(*LOCUST, str(LOCUSTFILE), *bound, *users, *ending, *options) as master,
            interruptible(*LOCUST, *worker) as first,
            interruptible(*LOCUST, *worker) as second,
        ):
            page: dict[str, Any] = {}
            while master.poll() is None:
                try:
                    page = httpx.get(f"http://127.0.0.1:{web}/percentiles", trust_env=False).json()
                except httpx.TransportError:
                    time.sleep(0.2)
            assert master.stderr
            errors = master.stderr.read()
            for process in (first, second):
                process.wait(30)
    rows = [read_samples(tmp_path / f"samples-{number}.csv") for number in range(2)]
    assert all(map(len, rows))
    both = as_samples(row.item() for row in np.concatenate(rows))
    # Each user has its own arrivals, whichever worker it is on.
    assert len(set(both.due_s.round(5))) > 0.95 * len(both)
    assert page["failed"] == 0
    (line,) = [line for line in errors.splitlines() if f"{len(both)} answered, 0 not" in line]
    median = float(line.partition("p50 ")[2].partition(",")[0])
    assert median == pytest.approx(np.median(both.latency_ms), rel=0.02)


def test_a_worker_that_cannot_read_its_images_ends_the_test_with_the_reason() -> None:
    """Else the master would report the rate of the others as that of all."""
    port, web = str(free_port()), str(free_port())
    bound = ["--master", "--master-bind-port", port, "--expect-workers", "1", "--web-port", web]
    load = ["--host", "http://127.0.0.1:1", "--data", "nowhere", "--users", "1"]
    with (
        interruptible(*LOCUST, str(LOCUSTFILE), *bound, *load, "--autostart", "--autoquit", "1") as master,
        interruptible(*LOCUST, str(LOCUSTFILE), "--worker", "--master-port", port),
    ):
        _, errors = master.communicate(timeout=PATIENCE_SECONDS)
    assert master.returncode == 1
    assert "nowhere is not a folder" in errors


def test_whoever_opens_the_web_page_cannot_name_a_file(ask: list[str], tmp_path: Path) -> None:
    web, wished = free_port(), tmp_path / "wished.csv"
    with fake_server(lambda _: 0.01) as fake:
        options = [*ask, "--host", fake.url, "--web-port", str(web), "--loop", "closed"]
        form = {"user_count": 1, "spawn_rate": 1, "host": fake.url, "samples": str(wished), "data": "/etc"}
        with interruptible(*LOCUST, str(LOCUSTFILE), *options) as process:
            while True:
                try:
                    assert httpx.post(f"http://127.0.0.1:{web}/swarm", data=form, trust_env=False).json()["success"]
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    time.sleep(0.1)
            wait_for_requests(fake, process, 10)
    assert not wished.exists()
    assert set(fake.bodies) == {bytes([number]) * 10 for number in range(5)}


@pytest.mark.parametrize(
    ("option", "value", "message"), [("data", "nowhere", "is not a folder"), ("rates", "9", "give RATE:SECONDS")]
)
def test_what_cannot_be_sent_ends_locust_with_the_reason(option: str, value: str, message: str) -> None:
    arguments = [str(LOCUSTFILE), "--headless", "--host", "http://127.0.0.1:1", f"--{option}", value]
    with interruptible(*LOCUST, *arguments) as process:
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    assert message in errors


def test_ctrl_c_keeps_the_samples_so_far(ask: list[str], tmp_path: Path) -> None:
    samples = tmp_path / "samples.csv"
    options = [*ask, "--rates", "50:600", "--samples", str(samples), "--only-summary"]
    with (
        fake_server(lambda _: 0.0) as fake,
        interruptible(*LOCUST, str(LOCUSTFILE), "--headless", "--host", fake.url, *options) as process,
    ):
        # The signal may arrive while requests are in flight; these are lost.
        wait_for_requests(fake, process, 40)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_SECONDS)
    assert len(read_samples(samples)) >= 20
