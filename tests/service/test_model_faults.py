"""Models that fail for some images, over HTTP and with real graphs: one behaviour, and only the guilty ones fail."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from service import throttle
from service.app import create_app
from service.errors import EngineError
from service.host import resident_bytes
from service.images import SMALL_BYTES
from service.models.arena import ArenaTrimmer
from service.pipeline import Pipeline
from service.scheduling.request import RequestState
from service.scheduling.scheduler import Batch
from service.settings import Settings
from tests.processes import wait_until
from tests.service.faulty import MEMORY_BYTES, Fault, faulty_graph, guilty_picture, guilty_pixels
from tests.service.identity import picture, publish_identity

FAULTS: tuple[Fault, ...] = ("nan", "fewer rows", "exception")
KINDS = {"nan": "not-finite", "fewer rows": "shape", "exception": "exception"}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """Models of one family that each have a fault, and one that has none and is less accurate."""
    for fault in FAULTS:
        publish_identity(tmp_path, f"identity-{fault.split()[0]}", top1=0.8, graph=faulty_graph(fault))
    publish_identity(tmp_path, "identity-sound", top1=0.5)
    settings = Settings(repository=tmp_path, threads=1, max_batch=4, max_consecutive_faults=5)
    with TestClient(create_app(settings)) as session:
        yield session


def pipeline_of(client: TestClient) -> Pipeline:
    found = client.app.state.pipeline  # type: ignore[attr-defined]
    assert isinstance(found, Pipeline)
    return found


def metric(client: TestClient, line: str) -> float:
    rows = [row for row in client.get("/metrics").text.splitlines() if row.startswith(line + " ")]
    return float(rows[0].rpartition(" ")[2]) if rows else 0.0


def index(client: TestClient, name: str) -> dict[str, str]:
    (entry,) = [entry for entry in client.post("/v2/repository/index").json() if entry["name"] == name]
    assert isinstance(entry, dict)
    return entry


def infer(client: TestClient, model: str, pixels: list[Any], *, binary: bool) -> Any:
    shape = [len(pixels), 2, 2, 3]
    tensor: dict[str, Any] = {"name": "image", "datatype": "UINT8", "shape": shape}
    if not binary:
        tensor["data"] = np.stack(pixels).ravel().tolist()
        return client.post(f"/v2/models/{model}/infer", content=json.dumps({"inputs": [tensor]}))
    raw = np.stack(pixels).tobytes()
    headers = {"Inference-Header-Content-Length": "0"}
    return client.post(f"/v2/models/{model}/infer", content=raw, headers=headers)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_model_is_one_answer_in_every_protocol(client: TestClient, fault: str) -> None:
    name = f"identity-{fault.split(maxsplit=1)[0]}"
    first = client.post(f"/v1/classify?model={name}", content=guilty_picture(1))
    assert first.status_code == 500
    assert first.json()["code"] == "model-fault"
    assert first.json()["detail"].startswith(f"model '{name}' version 1 ")
    for binary in (False, True):
        answer = infer(client, name, [guilty_pixels(1)], binary=binary)
        assert (answer.status_code, answer.json()) == (500, {"error": first.json()["detail"]})
    assert metric(client, f'stridevit_model_faults_total{{kind="{KINDS[fault]}",model="{name}"}}') == 3
    assert metric(client, "stridevit_pending_images") == metric(client, "stridevit_pending_bytes") == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_one_guilty_image_of_a_request_fails_alone(client: TestClient, fault: str) -> None:
    name = f"identity-{fault.split(maxsplit=1)[0]}"
    files = [("image", (f"{number}.png", picture(number))) for number in (1, 2, 3)]
    files[1] = ("image", ("2.png", guilty_picture(2)))
    for _ in range(6):
        answer = client.post(f"/v1/classify?model={name}&top_k=1", files=files)
        assert answer.status_code == 200, answer.text
        first, guilty, last = answer.json()["results"]
        assert guilty["error"]["code"] == "model-fault"
        assert [result["predictions"][0]["index"] for result in (first, last)] == [0, 0]
    assert index(client, name)["state"] == "READY", "others were answered in between"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_keeps_failing_is_taken_out_and_comes_back_by_request(
    client: TestClient, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "_SECONDS", 1e9)
    name = f"identity-{fault.split(maxsplit=1)[0]}"
    with capture_logs() as lines:
        for _ in range(5):
            assert client.post(f"/v1/classify?model={name}", content=guilty_picture(1)).status_code == 500
        wait_until(lambda: index(client, name)["state"] == "UNAVAILABLE")
    assert "it failed on 5 images in a row" in index(client, name)["reason"]
    assert [line["event"] for line in lines].count("model fault") == 1, "the log is not flooded"
    assert client.post(f"/v1/classify?model={name}", content=picture(1)).status_code == 404
    pipeline = pipeline_of(client)
    assert name not in [model.name for model in pipeline.registry.families["identity"]]
    assert client.post("/v1/classify?model=identity", content=picture(1)).status_code == 200
    assert client.portal
    client.portal.call(pipeline.registry.refresh)
    assert index(client, name)["state"] == "UNAVAILABLE", "polling does not bring it back"
    client.portal.call(pipeline.registry.load, name)
    assert index(client, name)["state"] == "READY"
    assert client.post(f"/v1/classify?model={name}", content=picture(1)).status_code == 200


def test_a_success_in_between_keeps_a_model_in_service(client: TestClient) -> None:
    for _ in range(3):
        for _ in range(4):
            assert client.post("/v1/classify?model=identity-nan", content=guilty_picture(1)).status_code == 500
        assert client.post("/v1/classify?model=identity-nan", content=picture(1)).status_code == 200
    assert index(client, "identity-nan")["state"] == "READY"


@pytest.mark.parametrize(
    "error", [MemoryError(), EngineError("ONNX Runtime cannot run the model on cpu: std::bad_alloc")]
)
def test_a_machine_without_memory_takes_no_model_out_of_service(client: TestClient, error: Exception) -> None:
    pipeline = pipeline_of(client)
    model = pipeline.registry.find("identity-nan")

    async def run_out() -> None:
        for _ in range(20):
            pipeline.faults.record(Batch(queue=model.queue, images=1, size=1, seconds=0.1, faults=[error]), model)

    assert client.portal
    client.portal.call(run_out)
    assert model.consecutive_faults == 0
    assert client.post("/v1/classify?model=identity-nan", content=picture(1)).status_code == 200


def test_memory_that_one_image_made_the_engine_take_is_given_back(tmp_path: Path) -> None:
    publish_identity(tmp_path, graph=faulty_graph("memory"))
    settings = Settings(repository=tmp_path, threads=1, max_batch=4, trim_memory_bytes=0)
    with TestClient(create_app(settings)) as client:
        pipeline = pipeline_of(client)
        trimmer = ArenaTrimmer(pipeline.registry, pipeline.scheduler, slack_bytes=MEMORY_BYTES // 2)

        def check() -> bool:
            assert client.portal
            return client.portal.call(trimmer.check)

        assert client.post("/v1/classify", content=picture(1)).status_code == 200
        assert not check(), "nothing has grown"
        before = resident_bytes()
        assert client.post("/v1/classify", content=guilty_picture(1)).status_code == 200
        assert resident_bytes() - before > MEMORY_BYTES * 0.8, "the arena keeps what it took"
        assert check()
        assert resident_bytes() - before < MEMORY_BYTES * 0.2
        assert not check(), "not again for the same growth"
        assert client.post("/v1/classify", content=picture(1)).status_code == 200


def test_growth_that_no_arena_gives_back_is_trimmed_for_once(tmp_path: Path) -> None:
    publish_identity(tmp_path)
    sizes = iter([100, 100, 250, 250, 260, 120, 230, 230])
    with TestClient(create_app(Settings(repository=tmp_path, threads=1, max_batch=1))) as client:
        pipeline = pipeline_of(client)

        async def scenario() -> list[bool]:
            trimmer = ArenaTrimmer(pipeline.registry, pipeline.scheduler, slack_bytes=100, resident=lambda: next(sizes))
            return [await trimmer.check() for _ in range(5)]

        # The first is read at the start, and one more after each trim.
        assert client.portal
        assert client.portal.call(scenario) == [False, True, False, False, True]


def test_what_the_arenas_of_other_lanes_need_is_no_reason_to_trim(tmp_path: Path) -> None:
    publish_identity(tmp_path)
    sizes = iter([100, 250, 350, 100])
    with TestClient(create_app(Settings(repository=tmp_path, threads=1, max_batch=1))) as client:
        pipeline = pipeline_of(client)
        model = pipeline.registry.find("identity-a")
        # As if it had been proven with two lanes that need 200 bytes together.
        model.arena_bytes, model.queue.cost.lanes = 200, 2

        async def scenario() -> list[bool]:
            trimmer = ArenaTrimmer(pipeline.registry, pipeline.scheduler, slack_bytes=100, resident=lambda: next(sizes))
            return [await trimmer.check() for _ in range(2)]

        assert client.portal
        assert client.portal.call(scenario) == [False, True]


def test_memory_of_bodies_and_decoders_is_no_reason_to_trim(tmp_path: Path) -> None:
    publish_identity(tmp_path)
    sizes, transient = iter([100, 450, 100, 210, 450, 100]), iter([350, 350, 0, 200, 0])
    with TestClient(create_app(Settings(repository=tmp_path, threads=1, max_batch=1))) as client:
        pipeline = pipeline_of(client)

        async def scenario() -> list[bool]:
            trimmer = ArenaTrimmer(
                pipeline.registry,
                pipeline.scheduler,
                slack_bytes=120,
                transient=lambda: next(transient),
                resident=lambda: next(sizes),
            )
            return [await trimmer.check() for _ in range(4)]

        assert client.portal
        assert client.portal.call(scenario) == [False, False, False, True]
        assert pipeline._trimmer._transient() == 0, "idle"

        def held() -> int:
            return pipeline._trimmer._transient()

        with pipeline.admission.admit(RequestState(seconds=60), pipeline.registry.ready[0].queue) as place:
            place.hold_bytes(1000)
            assert held() == 1000
            pipeline.admission.accept(place, pipeline.registry.ready[0].queue, 50, decoding=[20_000] * 50)
            threads = pipeline.load.decode_threads + pipeline.load.large_threads
            assert held() == 1000 + threads * SMALL_BYTES
        assert held() == 0


def test_the_watch_over_the_arenas_survives_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_identity(tmp_path)
    monkeypatch.setattr("service.models.arena._INTERVAL_SECONDS", 0.0)
    reads: list[int] = []

    def resident() -> int:
        reads.append(1)
        if len(reads) == 2:
            raise OSError("planted")
        return 100

    with (
        TestClient(create_app(Settings(repository=tmp_path, threads=1, max_batch=1))) as client,
        capture_logs() as logs,
    ):
        pipeline = pipeline_of(client)
        trimmer = ArenaTrimmer(pipeline.registry, pipeline.scheduler, slack_bytes=120, resident=resident)
        assert client.portal
        reads.clear()
        client.portal.call(trimmer.start)
        wait_until(lambda: len(reads) > 3)
        client.portal.call(trimmer.stop)
    assert [line["event"] for line in logs].count("arenas could not be trimmed") == 1
