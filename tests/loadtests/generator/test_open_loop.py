"""The open loop without Locust: what is sent, when it is due, and what a sample says."""

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from loadtests.experiment.load_runner import run_open_loop
from loadtests.experiment.server import Server, free_port
from loadtests.generator import payload_cache
from loadtests.generator.open_loop import arrivals
from loadtests.generator.rates import Part, poisson_arrivals
from loadtests.generator.readers import Payload
from loadtests.generator.samples import UNSENT, Sample, read_samples
from tests.loadtests.servers import Fake, fake_server
from tests.processes import PATIENCE_SECONDS, ROOT


@pytest.fixture
def ask(tmp_path: Path) -> list[str]:
    """Five payloads as arguments; the first is longer than what a socket takes at once."""
    folder = tmp_path / "payloads"
    folder.mkdir()
    payload_cache.save([Payload(str(n), bytes([n]) * (10 if n else 20_000_000), n) for n in range(5)], folder)
    return ["--data", str(folder), "--model", "m"]


def sent(fake: Fake, *arguments: str) -> list[Sample]:
    samples, _ = run_open_loop(Server(fake.url, name="the fake"), arguments, seconds=5)
    return [Sample(*row) for row in np.sort(samples, order="due_s")]


def test_arrivals_are_a_poisson_process_in_each_part() -> None:
    found = list(arrivals((Part(first=20, last=20, seconds=2), Part(first=50, last=50, seconds=1)), seed="3"))
    first = list(itertools.takewhile(lambda due: due < 2, poisson_arrivals(20, seed="3/0")))
    second = [2 + due for due in itertools.takewhile(lambda due: due < 1, poisson_arrivals(50, seed="3/1"))]
    assert found == first + second


def test_every_arrival_is_sent_once_and_its_answer_is_kept(ask: list[str]) -> None:
    # Every third connection breaks, every third answer is an error.
    status = (200, 503, 0)
    with fake_server(lambda _: 0.01, status=lambda n: status[n % 3], model=lambda n: f"number/{n}") as fake:
        samples = sent(fake, *ask, "--rates", "40:1,20:1", "--seed", "7")
    parts = (Part(first=40, last=40, seconds=1), Part(first=20, last=20, seconds=1))
    due = list(arrivals(parts, seed="7"))
    assert len(samples) == len(due) == len(fake.bodies) > 20
    assert np.diff([sample.due_s for sample in samples]) == pytest.approx(np.diff(due), abs=1e-5)
    assert [sample.image for sample in samples] == [number % 5 for number in range(len(samples))]
    for sample in samples:
        assert sample.latency_ms >= max(10, sample.behind_ms)
        if sample.model:
            assert sample.status == status[int(sample.model.partition("/")[2]) % 3]
        else:
            assert sample.status == 0
    assert {body[:1] for body in fake.bodies} == {bytes([number]) for number in range(5)}


@pytest.mark.parametrize(("flags", "close"), [((), None), (("--new-connections",), "close")])
def test_connections_are_kept_unless_each_request_is_to_have_its_own(
    ask: list[str], flags: tuple[str, ...], close: str | None
) -> None:
    with fake_server(lambda _: 0.0) as fake:
        samples = sent(fake, *ask, "--rates", "30:1", *flags)
    assert {sample.status for sample in samples} == {200}
    assert {headers.get("connection") for headers in fake.headers} == {close}


def test_beyond_the_cap_an_arrival_is_not_sent_and_counted(ask: list[str]) -> None:
    with fake_server(lambda _: 0.5) as fake:
        samples = sent(fake, *ask, "--rates", "100:1", "--in-flight", "3")
    unsent = [sample for sample in samples if sample.status == UNSENT]
    assert len(unsent) == len(samples) - len(fake.bodies) > 0
    assert fake.max_in_flight <= 3


def test_without_a_server_every_request_fails(ask: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests.generator.open_loop", "--host", f"http://127.0.0.1:{free_port()}"]
    command += [*ask, "--rates", "30:1", "--samples", str(tmp_path / "s.csv")]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=PATIENCE_SECONDS).returncode == 0
    samples = read_samples(tmp_path / "s.csv")
    assert len(samples) > 10
    assert set(samples.status) == {0}


def test_a_termination_keeps_the_samples_until_then(ask: list[str], tmp_path: Path) -> None:
    with fake_server(lambda _: 0.0) as fake:
        command = [sys.executable, "-m", "loadtests.generator.open_loop", "--host", fake.url, "--rates", "20:1000"]
        # One at a time: once the tenth is sent, nine are answered.
        command += ["--in-flight", "1"]
        process = subprocess.Popen([*command, *ask, "--samples", str(tmp_path / "s.csv")], cwd=ROOT)
        while len(fake.bodies) < 10:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
    assert (read_samples(tmp_path / "s.csv").status == 200).sum() >= 9


def test_a_ramp_is_refused(ask: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests.generator.open_loop", "--host", "http://127.0.0.1:9", *ask]
    command += ["--rates", "1>5:3", "--samples", str(tmp_path / "s.csv")]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert ended.returncode == 2
    assert "a ramp is no step" in ended.stderr
