"""The status is small, and says what /metrics says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from service import status as status_module
from service.app import create_app
from service.keys import new_key
from service.metrics import Metrics
from service.pipeline import Pipeline
from service.scheduling.watchdog import Watchdog
from service.settings import Settings
from service.status import MAX_BYTES, Status, StatusReport
from tests.service.conftest import Clock
from tests.service.identity import picture, publish_identity

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, top1 in (("identity-a", 0.9), ("identity-b", 0.5), ("identity-unused", 0.1)):
        publish_identity(folder, name, top1=top1)
    return folder


@pytest.fixture
def client(repository: Path) -> Iterator[TestClient]:
    app = create_app(Settings(repository=repository, threads=1))
    with TestClient(app) as session:
        # While the event loop is late, a deadline that is too near is refused for another reason.
        assert session.portal
        session.portal.call(app.state.pipeline.lag.stop)
        yield session


@pytest.fixture
def pipeline(client: TestClient) -> Pipeline:
    found = client.app.state.pipeline  # type: ignore[attr-defined]
    assert isinstance(found, Pipeline)
    return found


def samples(client: TestClient) -> Samples:
    """What a scrape reads."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name.removeprefix("stridevit_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def summed(scraped: Samples, name: str, label: str) -> dict[str, float]:
    """The values of a metric by one of its labels."""
    found: dict[str, float] = {}
    for (metric, labels), value in scraped.items():
        if metric == name:
            found[dict(labels)[label]] = found.get(dict(labels)[label], 0) + value
    return found


def quantile(scraped: Samples, model: str, fraction: float) -> float:
    """`histogram_quantile` of Prometheus, in its documentation's words: the bucket that holds the rank, and linear
    interpolation within it."""
    buckets = sorted(
        (float(dict(labels)["le"]), value)
        for (metric, labels), value in scraped.items()
        if metric == "stage_duration_seconds_bucket"
        and (dict(labels)["model"], dict(labels)["stage"]) == (model, "total")
    )
    rank = fraction * buckets[-1][1]
    low, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    raise AssertionError("no bucket holds all")


def make_traffic(client: TestClient) -> None:
    for number in range(20):
        assert client.post("/v1/classify?model=identity-a", content=picture(number)).status_code == 200
    form = [("image", (f"{number}.png", picture(number))) for number in range(5)]
    assert client.post("/v1/classify?model=identity-b", files=form).status_code == 200
    for _ in range(3):
        assert client.post("/v1/classify?model=identity", content=picture(1)).status_code == 200
    assert client.post("/v1/compare", content=picture(1)).status_code == 200
    assert client.post("/v1/classify?deadline_ms=0.001", content=picture(1)).status_code == 429
    assert client.post("/v1/classify", content=b"no image").status_code == 415


def test_after_real_traffic_it_says_what_metrics_says(client: TestClient) -> None:
    make_traffic(client)
    status = Status.model_validate(client.get("/v1/status").json())
    scraped = samples(client)
    outcomes = {
        dict(labels)["model"]: value
        for (metric, labels), value in scraped.items()
        if metric == "images_total" and dict(labels)["outcome"] == "ok"
    }
    assert outcomes["identity-b"] >= 6
    assert {model.name: model.images for model in status.models} == {"identity-unused": 0, **outcomes}
    assert status.refusals == summed(scraped, "rejections_total", "reason")
    assert status.refusals["deadline"] == 1
    assert status.choices == {"identity": summed(scraped, "choices_total", "model")}
    for model in status.models:
        # Everything has happened since the start, which is the window of the first status.
        # Rates are rounded to hundredths, which counts once the traffic has taken more than a second.
        assert model.images_per_s == pytest.approx(model.images / status.window_s, rel=0.01, abs=0.006)
        for percent, given in ((50, model.p50_ms), (95, model.p95_ms), (99, model.p99_ms)):
            if model.images:
                assert given == pytest.approx(1000 * quantile(scraped, model.name, percent / 100), abs=0.001)
            else:
                assert given is None
        memory = summed(scraped, "model_memory_bytes", "model")[model.name]
        assert model.memory_mb == pytest.approx(memory / 1e6, abs=0.06)
        assert (model.state, model.version) == ("ready", 1)
    assert status.queue.waiting == scraped["pending_images", ()] == 0
    assert status.queue.limit == client.app.state.pipeline.limits.max_pending_images  # type: ignore[attr-defined]
    assert (status.lanes, status.threads, status.device, status.ready) == (1, 1, "cpu", True)


def test_it_makes_no_series_and_is_counted_as_a_request_only(client: TestClient) -> None:
    make_traffic(client)
    before = set(samples(client))
    client.get("/v1/status")
    new = set(samples(client)) - before
    assert {dict(labels).get("route") for _, labels in new} <= {"/v1/status", "/metrics"}


def test_rates_and_percentiles_are_those_of_the_last_ten_seconds(pipeline: Pipeline) -> None:
    clock = Clock()
    report = StatusReport(pipeline, device="cpu", clock=clock)
    metrics = pipeline.metrics

    def answered(count: int, seconds: float) -> None:
        metrics.images("identity-a", "ok").inc(count)
        for _ in range(count):
            metrics.stage_seconds("identity-a", "total").observe(seconds)

    def look() -> dict[str, Any]:
        status: dict[str, Any] = json.loads(report.json())
        return {**status["models"][0], "window_s": status["window_s"]}

    clock.now += 4
    answered(40, 0.004)
    first = look()
    assert (first["window_s"], first["images"], first["images_per_s"]) == (4.0, 40, 10.0)
    assert 2.5 < first["p50_ms"] <= 5
    for _ in range(12):
        clock.now += 1
        answered(3, 0.2)
        last = look()
    assert (last["window_s"], last["images"], last["images_per_s"]) == (10.0, 76, 3.0)
    assert 100 < last["p50_ms"] <= 250, "the fast ones are older than ten seconds"
    # Nobody asked for a while: the window is what there is, and short again soon.
    clock.now += 100
    assert look()["window_s"] == 100.0
    clock.now += 2
    quiet = look()
    assert (quiet["window_s"], quiet["images_per_s"], quiet["p50_ms"]) == (2.0, 0.0, None)


def test_many_who_ask_keep_few_snapshots(pipeline: Pipeline) -> None:
    clock = Clock()
    report = StatusReport(pipeline, device="cpu", clock=clock)
    for _ in range(2000):
        clock.now += 0.01
        report.json()
    assert len(report._snapshots) <= 23
    assert json.loads(report.json())["window_s"] == pytest.approx(10, abs=0.6)


def test_it_stays_small_however_many_models_there_are(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = noted(monkeypatch, status_module, "_milliseconds")
    with TestClient(create_app(Settings(repository=repository, threads=1))) as client:
        pipeline = client.app.state.pipeline  # type: ignore[attr-defined]
        index = pipeline.registry._index
        for number in range(200):
            name = f"a-model-with-quite-a-long-name-{number:03}"
            index.note(name, 1, "unavailable", "planted")
            pipeline.metrics.images(name, "ok").inc(number)
            pipeline.metrics.choices("family-of-" + name, name, "deadline").inc(number)
        answer = client.get("/v1/status")
        status = Status.model_validate(answer.json())
    assert MAX_BYTES - 700 < len(answer.content) <= MAX_BYTES
    assert len(status.models) + status.models_left_out == 203
    assert [model.images for model in status.models] == list(range(199, 199 - len(status.models), -1))
    assert set(status.choices) == {f"family-of-{model.name}" for model in status.models}
    # Three of each, and those of the first model for which there was no room.
    assert len(computed) == 3 * (len(status.models) + 1), "percentiles are computed only of what is listed"


def noted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The first arguments of all later calls of a function."""
    calls: list[Any] = []
    real = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        calls.append(arguments[0])
        return real(*arguments)

    monkeypatch.setattr(owner, name, call)
    return calls


def test_only_models_with_new_requests_have_their_buckets_read(
    client: TestClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_traffic(client)
    first = client.get("/v1/status").json()
    read = noted(monkeypatch, pipeline.metrics, "request_buckets")
    assert client.get("/v1/status").json()["models"][0]["images"] == first["models"][0]["images"]
    assert read == []
    client.post("/v1/classify?model=identity-b", content=picture(1))
    client.get("/v1/status")
    assert read == ["identity-b"]


def test_while_the_engine_hangs_it_says_so(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watchdog, "hang", "planted")
    status = client.get("/v1/status").json()
    assert (status["ready"], status["drain_s"]) == (False, None)
    assert {model["state"] for model in status["models"]} == {"unavailable"}


def test_it_needs_a_key_where_models_do(repository: Path) -> None:
    key, digest = new_key()
    with TestClient(create_app(Settings(repository=repository, threads=1, api_key_hashes=(digest,)))) as client:
        for path in ("/v1/status", "/v1/families/identity/plan", "/v1/models"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"X-API-Key": key}).status_code == 200
        assert client.post("/v1/compare", content=picture(1)).status_code == 401


def test_a_series_without_traffic_has_no_percentile() -> None:
    assert Metrics().request_buckets("nobody")[-1] == 0
