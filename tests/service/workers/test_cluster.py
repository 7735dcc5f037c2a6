"""Real workers behind a real Envoy, under load: killed, restarted, changed and ended."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from service.keys import new_key
from service.workers.envoy import BUFFERED_BYTES
from tests.clients.closed_loop import ClosedLoop, Outcome, encoded
from tests.processes import PATIENCE_SECONDS, get, post, still_running, wait_until
from tests.processes import PATIENT_SERVICE as PATIENT
from tests.service.identity import picture, publish_identity
from tests.service.workers.served import Served, pretend, workers_serving

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800), pytest.mark.usefixtures("_envoy")]

REQUESTS = 2000
PNG = picture(3)
CONNECTIONS = 16


def padded(size: int) -> bytes:
    """A picture in a body of `size` bytes."""
    return PNG + bytes(size - len(PNG))


def under_load(served: Served, requests: list[bytes], meanwhile: Callable[[ClosedLoop], None], *, most: int) -> Outcome:
    """Send `most` requests from 16 connections, and do something in another thread meanwhile."""

    async def both() -> Outcome:
        loop = ClosedLoop(served.port, requests, connections=CONNECTIONS, most=most)
        outcome, _ = await asyncio.gather(loop.run(), asyncio.to_thread(meanwhile, loop))
        return outcome

    return asyncio.run(both())


def until_sent(loop: ClosedLoop, count: int) -> None:
    while loop.outcome.sent < count:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def service(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two workers that the tests of this file share; each leaves both ready."""
    with workers_serving(repository, tmp_path_factory.mktemp("shared"), environment=PATIENT) as served:
        yield served


def test_metrics_add_up_to_what_was_sent_and_both_workers_have_their_part(service: Served) -> None:
    route = {"route": "/v1/classify", "status": "200"}
    before = service.metric("stridevit_requests_total", **route)
    parts = [service.metric("stridevit_worker_requests_total", worker=worker) for worker in "01"]
    outcome = under_load(service, [encoded(PNG)], lambda _: None, most=REQUESTS)
    assert outcome.statuses == {"200": REQUESTS}
    assert service.metric("stridevit_requests_total", **route) - before == REQUESTS
    assert service.metric("stridevit_images_total", outcome="ok") >= REQUESTS
    assert json.loads(get(service.url + "/v1/status").text)["models"][0]["images"] >= REQUESTS
    shares = [
        (service.metric("stridevit_worker_requests_total", worker=worker) - part) / REQUESTS
        for worker, part in zip("01", parts, strict=True)
    ]
    assert sum(shares) == 1
    # Nobody is left out. How even it is on an idle machine is a figure of docs/workers.md.
    assert min(shares) > 0.25


@pytest.mark.parametrize("size", [len(PNG), 500_000, BUFFERED_BYTES])
def test_a_killed_worker_loses_no_request(size: int, service: Served) -> None:
    requests = REQUESTS if size < 500_000 else REQUESTS // 4
    for victim in (0, 1, 0):  # by age: at last the oldest, when the other one has just come back
        before = service.metric("stridevit_requests_total", route="/v1/classify", status="200")
        killed = service.workers()[victim]

        def kill(loop: ClosedLoop, killed: psutil.Process = killed) -> None:
            until_sent(loop, requests // 3)
            killed.kill()

        outcome = under_load(service, [encoded(padded(size))], kill, most=requests)
        assert outcome.statuses == {"200": requests}
        wait_until(lambda killed=killed: not still_running([killed]))  # type: ignore[misc]
        service.until_all_ready()
        # One answer may have been sent, and not yet counted, by the worker that was killed.
        counted = service.metric("stridevit_requests_total", route="/v1/classify", status="200") - before
        assert requests - 1 <= counted <= requests + CONNECTIONS
    assert service.metric("stridevit_worker_deaths_total") >= 3


def test_a_worker_that_dies_while_bodies_arrive_loses_none_of_them(service: Served) -> None:
    body = padded(200_000)
    head = b"POST /v1/classify HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    deaths = service.metric("stridevit_worker_deaths_total")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", service.port))) for _ in range(8)]
        for client in clients:
            client.settimeout(PATIENCE_SECONDS)
            client.sendall(head + body[:100_000])
        # Whatever is passed on of them is passed on by now.
        get(service.url + "/readyz")
        time.sleep(0.5)
        service.workers()[0].kill()
        wait_until(lambda: service.metric("stridevit_worker_deaths_total") == deaths + 1, service.process)
        for client in clients:
            client.sendall(body[100_000:])
        assert [client.recv(12) for client in clients] == [b"HTTP/1.1 200"] * 8
    service.until_all_ready()


def test_a_rolling_restart_loses_no_request_and_replaces_every_worker(service: Served) -> None:
    before = {worker.pid for worker in service.workers()}
    assert len(before) == 2

    def restart(loop: ClosedLoop) -> None:
        until_sent(loop, 50)
        service.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "rolling restart done" in service.log.read_text(), service.process)
        loop.stop()

    outcome = under_load(service, [encoded(padded(40_000))], restart, most=100_000)
    assert outcome.failed == 0, outcome.statuses
    assert before.isdisjoint(worker.pid for worker in service.workers())
    assert service.metric("stridevit_workers", state="ready") == 2


def test_large_bodies_and_those_of_unknown_length_pass_and_limits_are_those_of_the_service(service: Served) -> None:
    def pieces(count: int) -> Iterator[bytes]:
        yield PNG
        for _ in range(count):
            yield bytes(100_000)

    url = service.url + "/v1/classify"
    assert post(url, padded(BUFFERED_BYTES + 1)).status_code == 200
    assert post(url, pieces(20)).status_code == 200
    refused = post(url, padded(40 << 20))
    assert (refused.status_code, refused.json()["code"]) == (413, "body-too-large")


def test_a_comparison_is_streamed_line_by_line(service: Served) -> None:
    url = f"{service.url}/v1/compare?models=identity-a"
    with httpx.stream("POST", url, content=PNG, timeout=PATIENCE_SECONDS, trust_env=False) as answer:
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        assert answer.headers["transfer-encoding"] == "chunked"
        events = [json.loads(line)["event"] for line in answer.iter_lines()]
    assert events == ["picture", "answer", "end"]


def test_probes_and_odd_paths_reach_the_supervisor(service: Served) -> None:
    for path in ("/healthz", "/readyz", "/readyz/", "/v2/health/ready", "/v2/health/live", "/v2/he%61lth/ready"):
        assert get(service.url + path).status_code == 200, path
    # Written so that the front does not know it, and passed on by the worker that it goes to.
    odd = get(service.url + "/m%65trics")
    assert 'process_cpu_seconds_total{worker="1"}' in odd.text
    assert get(service.url + "/internal/metrics").status_code == 404
    assert get(service.url + "/readyz").headers["x-request-id"]
    assert httpx.head(service.url + "/metrics", trust_env=False, timeout=PATIENCE_SECONDS).status_code == 200


def test_the_supervisor_computes_nothing_and_does_not_load_the_engine(service: Served) -> None:
    maps = Path(f"/proc/{service.process.pid}/maps").read_text()
    assert "onnxruntime" not in maps
    assert "onnxruntime" in Path(f"/proc/{service.workers()[0].pid}/maps").read_text()


def test_each_worker_is_pinned_to_its_cores(service: Served) -> None:
    cores = [set(worker.cpu_affinity()) for worker in service.workers()]
    if len(os.sched_getaffinity(0)) > 1:
        assert cores[0].isdisjoint(cores[1])


def load_key() -> tuple[dict[str, str], dict[str, str]]:
    """The environment with an admin key, and the header with it."""
    key, digest = new_key()
    return {"STRIDEVIT_ADMIN_KEY_HASH": digest, **PATIENT}, {"X-API-Key": key}


@pytest.mark.parametrize("front", [True, False])
def test_load_and_unload_reach_all_workers_and_a_broken_version_none(front: bool, tmp_path: Path) -> None:
    models, environment, headers = tmp_path / "models", *load_key()
    publish_identity(models, "identity-a")
    publish_identity(models, "identity-b")
    if not front:
        environment |= pretend(tmp_path / "envoy", None)
    with workers_serving(models, tmp_path, environment=environment) as served:
        assert ("uneven" in served.log.read_text()) != front

        def change(name: str, what: str) -> httpx.Response:
            return post(f"{served.url}/v2/repository/models/{name}/{what}", b"", headers=headers)

        def versions() -> set[tuple[str, str]]:
            # From many connections, so that both workers answer.
            with ThreadPoolExecutor(8) as pool:
                answers = pool.map(lambda _: get(served.url + "/v2/models/identity-a"), range(24))
            return {(str(a.status_code), ",".join(a.json().get("versions", []))) for a in answers}

        assert change("identity-b", "unload").status_code == 200
        assert change("identity-b", "unload").status_code == 404
        publish_identity(models, "identity-a")
        assert versions() == {("200", "1")}
        assert change("identity-a", "load").status_code == 200
        assert versions() == {("200", "2")}
        publish_identity(models, "identity-a")
        broken = models / "identity-a" / "3" / "model.onnx"
        broken.write_bytes(broken.read_bytes()[:-1])
        refused = change("identity-a", "load")
        assert refused.status_code == 400
        assert "model.onnx" in refused.json()["error"]
        assert versions() == {("200", "2")}
        shutil.rmtree(broken.parent)
        assert post(f"{served.url}/v2/repository/models/identity-a/load", b"").status_code == 403
        # A worker that starts again serves what the others serve.
        publish_identity(models, "identity-a")
        served.workers()[0].kill()
        wait_until(lambda: served.metric("stridevit_worker_deaths_total") == 1, served.process)
        served.until_all_ready()
        assert versions() == {("200", "2")}
        index = post(f"{served.url}/v2/repository/index", b"").json()
        states = {(entry["name"], entry["version"]): entry["state"] for entry in index}
        assert states["identity-a", "2"] == "READY"
        assert states["identity-b", "1"] == "UNAVAILABLE"
        assert post(f"{served.url}/v1/classify?model=identity-a", picture(3)).status_code == 200


def test_limits_of_a_key_hold_for_all_workers(repository: Path, tmp_path: Path) -> None:
    key, digest = new_key()
    lines = ["[[keys]]", 'name = "alice"', f'sha256 = "{digest}"', 'scopes = ["classify"]']
    lines += ["requests_per_second = 0.001", "burst = 12", "max_concurrent = 3"]
    (tmp_path / "keys.toml").write_text("\n".join(lines))
    with workers_serving(
        repository, tmp_path, "--keys-file", str(tmp_path / "keys.toml"), environment=PATIENT
    ) as served:
        head = f"POST /v1/classify HTTP/1.1\r\nHost: h\r\nX-API-Key: {key}\r\nTransfer-Encoding: chunked\r\n\r\n"
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
                client.sendall(head.encode())
            wait_until(lambda: served.metric("stridevit_key_requests_in_work", key="alice") == 3)
            for _ in range(8):
                refused = post(served.url + "/v1/classify", PNG, headers={"X-API-Key": key})
                assert (refused.status_code, refused.json()["code"]) == (429, "key-limited")
        wait_until(lambda: served.metric("stridevit_key_requests_in_work", key="alice") == 0)
        statuses = [post(served.url + "/v1/classify", PNG, headers={"X-API-Key": key}).status_code for _ in range(20)]
        assert statuses == [200] * 9 + [429] * 11
        assert post(served.url + "/v1/classify", PNG).status_code == 401
        assert served.metric("stridevit_rejections_total", reason="key-rate") == 11
        assert get(served.url + "/v1/status").status_code == 401


def test_bytes_of_bodies_hold_for_all_workers_and_those_of_a_dead_one_are_free(
    repository: Path, tmp_path: Path
) -> None:
    limits = {"STRIDEVIT_MAX_PENDING_BYTES": "3000000", "STRIDEVIT_MAX_BODY_BYTES": "2000000"}
    with workers_serving(repository, tmp_path, environment=PATIENT | limits) as served, contextlib.ExitStack() as stack:
        head = b"POST /v1/classify HTTP/1.1\r\nHost: h\r\nContent-Length: 1900000\r\n\r\n"
        for _ in range(2):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            client.sendall(head + bytes(1_000_000))
        wait_until(lambda: served.metric("stridevit_pending_bytes") == 2_000_000)
        refused = post(served.url + "/v1/classify", padded(1_020_000))
        assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
        for worker in served.workers():
            worker.kill()
        wait_until(lambda: served.metric("stridevit_worker_deaths_total") == 2, served.process)
        served.until_all_ready()
        assert post(served.url + "/v1/classify", padded(1_020_000)).status_code == 200


def test_sigterm_answers_what_was_accepted_and_exits_with_0(repository: Path, tmp_path: Path) -> None:
    environment = PATIENT | {"STRIDEVIT_SHUTDOWN_DELAY_SECONDS": "1"}
    with workers_serving(repository, tmp_path, environment=environment) as served:
        family = psutil.Process(served.process.pid).children(recursive=True)

        def end(loop: ClosedLoop) -> None:
            until_sent(loop, 200)
            served.process.send_signal(signal.SIGTERM)
            served.process.wait(PATIENCE_SECONDS)
            loop.stop()

        outcome = under_load(served, [encoded(padded(100_000))], end, most=100_000)
        assert served.process.returncode == 0, served.log.read_text()
        # After the end nobody listens; until then every request is answered.
        assert set(outcome.statuses) <= {"200", "ConnectionRefusedError"}, outcome.statuses
        assert outcome.statuses["200"] > 100
        assert still_running(family) == []


def test_a_second_signal_ends_all_processes_at_once(repository: Path, tmp_path: Path) -> None:
    environment = PATIENT | {"STRIDEVIT_SHUTDOWN_DELAY_SECONDS": "600"}
    with workers_serving(repository, tmp_path, environment=environment) as served:
        family = psutil.Process(served.process.pid).children(recursive=True)
        served.process.send_signal(signal.SIGINT)
        wait_until(lambda: get(served.url + "/readyz").status_code == 503)
        assert post(served.url + "/v1/classify", PNG).status_code == 200
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(PATIENCE_SECONDS) == 128 + signal.SIGINT
        wait_until(lambda: not still_running(family))


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for the names of sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_the_death_of_the_supervisor_ends_workers_and_front_and_the_next_start_removes_their_folder(
    repository: Path, tmp_path: Path, short_folder: Path
) -> None:
    temporary = short_folder
    environment = PATIENT | {"TMPDIR": str(temporary)}
    with workers_serving(repository, tmp_path, environment=environment) as served:
        family = psutil.Process(served.process.pid).children(recursive=True)
        assert len(family) == 3
        (left,) = temporary.iterdir()
        served.process.kill()
        wait_until(lambda: not still_running(family))
    with workers_serving(repository, tmp_path, environment=environment) as served:
        assert left not in temporary.iterdir()
        served.front()[0].kill()
        wait_until(lambda: "the front ended" in served.log.read_text(), served.process)
        served.until_all_ready()
        assert post(served.url + "/v1/classify", PNG).status_code == 200
    assert list(temporary.iterdir()) == []


def test_without_the_extra_workers_share_the_port_and_the_end_is_the_same(repository: Path, tmp_path: Path) -> None:
    environment = PATIENT | pretend(tmp_path / "envoy", None)
    with workers_serving(repository, tmp_path, environment=environment) as served:
        assert served.front() == []
        assert "pip install 'stridevit[workers]'" in served.log.read_text()
        outcome = under_load(served, [encoded(PNG, headers=["Connection: close"])], lambda _: None, most=400)
        assert outcome.statuses == {"200": 400}
        assert served.metric("stridevit_requests_total", route="/v1/classify", status="200") == 400
        assert min(served.metric("stridevit_worker_requests_total", worker=worker) for worker in "01") > 0
        assert get(served.url + "/v1/status").json()["threads"] == 2
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(PATIENCE_SECONDS) == 0
