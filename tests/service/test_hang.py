"""An engine that hangs: deadlines are kept, the service says that it is not ready, and the process ends in time."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from service.app import create_app
from service.pipeline import Pipeline
from service.scheduling.request import RequestState
from service.scheduling.scheduler import Outputs, Pixels
from service.scheduling.watchdog import EXIT_STATUS
from service.settings import Settings
from tests.processes import PATIENCE_SECONDS, get, post, serving, wait_until
from tests.service.faulty import faulty_graph, guilty_picture
from tests.service.identity import picture, publish_identity

PROBES = ("/readyz", "/healthz", "/v2/health/ready", "/v2/health/live", "/v2/models/identity-a/ready")


class Held:
    """Holds the engine of a model up from the next batch on, until it is let go."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._queue = pipeline.registry.find("identity-a").queue
        self._run = self._queue.run
        self._queue.run = self._wait
        self.at_work, self.free = threading.Event(), threading.Event()

    def _wait(self, images: Pixels, threads: int) -> Outputs:
        self.at_work.set()
        assert self.free.wait(PATIENCE_SECONDS)
        return self._run(images, threads)


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    publish_identity(tmp_path)
    publish_identity(tmp_path, "identity-b")
    # Looked at by the tests: the watchdog's own timer never finds a hang in these times.
    settings = Settings(
        repository=tmp_path,
        threads=1,
        max_batch=4,
        hang_min_seconds=5000,
        hang_max_seconds=5000,
        hang_exit_seconds=1e6,
    )
    return create_app(settings)


@pytest.fixture
def pipeline(app: FastAPI) -> Pipeline:
    found = app.state.pipeline
    assert isinstance(found, Pipeline)
    return found


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as session:
        # On a busy machine deadlines as near as these would be refused for the loop's lag.
        assert session.portal
        session.portal.call(app.state.pipeline.lag.stop)
        yield session


@pytest.fixture
def all_admitted(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Admit even requests whose deadline a busy machine may miss."""
    monkeypatch.setattr(pipeline.admission, "require_in_time", lambda *_: None)


def metric(client: TestClient, name: str) -> float:
    (row,) = [row for row in client.get("/metrics").text.splitlines() if row.startswith(name + " ")]
    return float(row.rpartition(" ")[2])


@pytest.mark.usefixtures("all_admitted")
def test_a_deadline_is_answered_at_its_time_while_the_batch_hangs(client: TestClient, pipeline: Pipeline) -> None:
    held = Held(pipeline)
    files = [("image", (f"{number}.png", picture(number))) for number in range(3)]
    answers = [
        client.post("/v1/classify?model=identity-a&deadline_ms=3000", content=picture(1)),  # runs
        client.post("/v1/classify?model=identity-a&deadline_ms=300", files=files),
        client.post("/v1/classify?model=identity-b&deadline_ms=300", content=picture(1)),  # another queue
        client.post(
            "/v2/models/identity-b/infer?deadline_ms=300",
            content=np.zeros((1, 2, 2, 3), np.uint8).tobytes(),
            headers={"Inference-Header-Content-Length": "0"},
        ),
    ]
    assert held.at_work.is_set()
    assert not held.free.is_set()
    assert [answer.status_code for answer in answers] == [504] * 4
    assert metric(client, "stridevit_pending_images") == metric(client, "stridevit_pending_bytes") == 0
    held.free.set()
    answer = client.post("/v1/classify?model=identity-a&top_k=1", content=picture(9))
    assert answer.json()["results"][0]["predictions"][0]["index"] == 0


@pytest.mark.usefixtures("all_admitted")
def test_a_deadline_is_answered_while_the_decoders_hang(client: TestClient, pipeline: Pipeline) -> None:
    free, at_work = threading.Event(), threading.Event()

    def work() -> None:
        at_work.set()
        assert free.wait(PATIENCE_SECONDS)

    async def occupy() -> "asyncio.Task[None]":
        task = asyncio.create_task(pipeline.decoders.run(RequestState(seconds=1e6), work))
        await asyncio.sleep(0)
        return task

    assert client.portal
    task = client.portal.call(occupy)
    assert at_work.wait(PATIENCE_SECONDS)
    photo = client.post("/v1/classify?model=identity-a&deadline_ms=300", content=picture(1))
    # A large body is parsed by the decoders.
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [0] * 12}
    body = json.dumps({"inputs": [tensor], "id": "x" * 40_000})
    parsed = client.post("/v2/models/identity-a/infer?deadline_ms=300", content=body)
    assert [photo.status_code, parsed.status_code] == [504, 504]
    assert metric(client, "stridevit_pending_images") == metric(client, "stridevit_pending_bytes") == 0
    free.set()

    async def done() -> None:
        await task

    client.portal.call(done)


def test_while_the_engine_hangs_probes_the_index_and_requests_say_so(client: TestClient, pipeline: Pipeline) -> None:
    held, watchdog = Held(pipeline), pipeline.scheduler._watchdog
    assert client.portal
    assert [client.get(probe).status_code for probe in PROBES] == [200] * 5
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.post, "/v1/classify?model=identity-a", content=picture(1))]
        # Only then the other: it would be answered if it came first.
        assert held.at_work.wait(PATIENCE_SECONDS)
        waiting.append(pool.submit(client.post, "/v1/classify?model=identity-b", content=picture(1)))
        wait_until(lambda: pipeline.admission.images == 2)

        def look() -> bool:
            # As if the batch had been running for longer than any may.
            watchdog._seconds = dict.fromkeys(watchdog._seconds, 6000)
            watchdog.look()
            return watchdog.hang is not None

        wait_until(lambda: bool(client.portal and client.portal.call(look)))
        answers = [one.result(PATIENCE_SECONDS) for one in waiting]
        assert [answer.status_code for answer in answers] == [503, 503]
        assert {answer.json()["code"] for answer in answers} == {"not-ready"}
    assert [client.get(probe).status_code for probe in PROBES] == [503] * 5
    assert client.post("/v1/classify?model=identity-b", content=picture(1)).status_code == 503
    entries = client.post("/v2/repository/index").json()
    assert {entry["state"] for entry in entries} == {"UNAVAILABLE"}
    assert all("a batch of 1 of model 'identity-a' version 1" in entry["reason"] for entry in entries)
    assert metric(client, "stridevit_predicted_drain_seconds") == float("inf")
    assert metric(client, "stridevit_engine_hung") == 1
    assert metric(client, "stridevit_pending_images") == 0
    held.free.set()
    wait_until(lambda: client.get("/readyz").status_code == 200)
    assert [client.get(probe).status_code for probe in PROBES] == [200] * 5
    assert {entry["state"] for entry in client.post("/v2/repository/index").json()} == {"READY"}
    assert client.post("/v1/classify?model=identity-b", content=picture(1)).status_code == 200
    assert metric(client, "stridevit_engine_hung") == 0


@pytest.fixture
def hanging(tmp_path: Path) -> Path:
    """A repository whose model runs a loop of 10**15 turns for one kind of image."""
    publish_identity(tmp_path, graph=faulty_graph("hang"))
    return tmp_path


@pytest.mark.slow
def test_a_process_whose_engine_does_not_come_back_ends_with_its_own_status(hanging: Path) -> None:
    environment = {"STRIDEVIT_HANG_MIN_SECONDS": "2", "STRIDEVIT_HANG_EXIT_SECONDS": "20", "STRIDEVIT_THREADS": "1"}
    with serving(hanging, environment=environment) as (url, process):
        assert post(url + "/v1/classify", picture(1)).status_code == 200

        def hangs() -> bool:
            # Refused, or too late to be computed, if the machine stood still a moment ago.
            assert post(url + "/v1/classify?deadline_ms=1000", guilty_picture(1)).status_code in (429, 503, 504)
            return get(url + "/healthz").status_code == 503

        wait_until(hangs, process)
        assert post(url + "/v1/classify", picture(1)).status_code == 503
        assert process.wait(PATIENCE_SECONDS) == EXIT_STATUS
        assert process.stderr
        last = process.stderr.read().splitlines()[-1]
        line = json.loads(last)
        assert (line["level"], line["exit_status"]) == ("critical", EXIT_STATUS)
        assert "a batch of 1 of model 'identity-a' version 1" in line["reason"]


@pytest.mark.slow
def test_sigterm_ends_a_process_whose_engine_hangs(hanging: Path) -> None:
    environment = {"STRIDEVIT_GRACEFUL_TIMEOUT_SECONDS": "2", "STRIDEVIT_THREADS": "1"}
    environment |= {"STRIDEVIT_HANG_MIN_SECONDS": "500", "STRIDEVIT_HANG_MAX_SECONDS": "500"}
    with serving(hanging, environment=environment) as (url, process), ThreadPoolExecutor(1) as pool:
        hung = pool.submit(httpx.post, url + "/v1/classify?deadline_ms=120000", content=guilty_picture(1), timeout=300)
        wait_until(lambda: "stridevit_pending_images 1.0" in httpx.get(url + "/metrics", timeout=300).text)
        process.send_signal(signal.SIGTERM)
        # By its own means: nothing kills it, and neither its engine nor the request's deadline ends.
        assert process.wait(100) == EXIT_STATUS
        assert process.stderr
        assert "the engine did not end its work: aborted" in process.stderr.read()
        # Its request was cancelled when its time to finish was over.
        assert hung.exception() or hung.result().status_code >= 500


def test_the_exit_status_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "service.md").read_text(encoding="utf-8")
    assert f"status {EXIT_STATUS}" in text


def test_it_ends_with_its_status_also_where_standard_error_was_closed() -> None:
    code = "import sys; sys.stderr = None; from service.scheduling.watchdog import end_process; end_process('planted')"
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=PATIENCE_SECONDS)
    assert ended.returncode == EXIT_STATUS
