"""A plan says what a request would get, and changes nothing by saying so."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.pipeline import Pipeline
from service.scheduling.cost import Cost
from service.scheduling.request import RequestState
from service.settings import Settings
from tests.processes import wait_until
from tests.service.identity import picture, publish_identity

SECONDS = {"slow": 400.0, "twin": 390.0, "middle": 100.0, "fast": 20.0}
"""What a batch of one is predicted to take, so that no test depends on what this machine does. The most accurate model
comes first; the twin is never worth its accuracy."""


class Fixed(Cost):
    """A cost model that no timing changes."""

    def observe(self, size: int, seconds: float, threads: int | None = None) -> None:
        pass


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, top1 in zip(SECONDS, (0.9, 0.8, 0.7, 0.6), strict=True):
        publish_identity(folder, name, top1=top1, family="rungs")
    return folder


@pytest.fixture
def client(repository: Path) -> Iterator[TestClient]:
    limits: dict[str, Any] = {"deadline_margin": 1.0, "max_deadline_ms": 1e7, "step_up_headroom": 0.5}
    app = create_app(Settings(repository=repository, threads=1, max_batch=1, **limits))
    with TestClient(app) as session:
        assert session.portal
        session.portal.call(app.state.pipeline.lag.stop)
        for model in app.state.pipeline.registry.ready:
            model.queue.cost = Fixed({1: SECONDS[model.name]}, app.state.pipeline.load)
        yield session


@pytest.fixture
def pipeline(client: TestClient) -> Pipeline:
    found = client.app.state.pipeline  # type: ignore[attr-defined]
    assert isinstance(found, Pipeline)
    return found


@contextmanager
def waiting(pipeline: Pipeline, name: str) -> Iterator[None]:
    """An image of another request that a model has yet to answer."""
    queue = pipeline.registry.find(name).queue
    with pipeline.admission.admit(RequestState(seconds=800), queue) as place:
        pipeline.admission.accept(place, queue, 1)
        yield


def planned(client: TestClient, seconds: float, **more: int) -> dict[str, Any]:
    answer = client.get("/v1/families/rungs/plan", params={"deadline_ms": 1000 * seconds, **more})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def chosen(client: TestClient, seconds: float) -> dict[str, Any]:
    """The choice of a real request."""
    answer = client.post(f"/v1/classify?model=rungs&deadline_ms={1000 * seconds}", content=picture(1))
    assert answer.status_code == 200, answer.text
    # A batch that has just given its answer is predicted to run for minutes more, until its lane is done with it.
    lanes = client.app.state.pipeline.scheduler.lanes  # type: ignore[attr-defined]
    wait_until(lambda: not lanes.runs)
    choice: dict[str, Any] = answer.json()["choice"]
    return {**choice, "model": answer.json()["model"]}


def whys(plan: dict[str, Any]) -> dict[str, str]:
    return {rung["model"]: rung["why"] for rung in plan["rungs"]}


def test_each_rung_says_what_it_would_take_and_why_it_is_not_chosen(client: TestClient) -> None:
    plan = planned(client, 150)
    assert (plan["family"], plan["deadline_ms"], plan["images"], plan["in_time"]) == ("rungs", 150_000, 1, True)
    assert (plan["chosen"], plan["reason"]) == ("middle", "deadline")
    assert whys(plan) == {"slow": "late", "twin": "no_faster", "middle": "chosen", "fast": "less_accurate"}
    assert [rung["top1"] for rung in plan["rungs"]] == [0.9, 0.8, 0.7, 0.6]
    for rung in plan["rungs"]:
        assert rung["predicted_ms"] == pytest.approx(1000 * SECONDS[rung["model"]], rel=1e-3)
        assert rung["queue_ms"] + rung["compute_ms"] == pytest.approx(rung["predicted_ms"], abs=0.01)
        assert (rung["chosen"], rung["version"], rung["precision"]) == (rung["model"] == "middle", 1, "fp32")
        assert rung["in_time"] == (SECONDS[rung["model"]] <= 150)


def test_what_is_in_time_is_a_share_of_the_deadline(
    client: TestClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.admission, "_margin", 0.5)
    plan = planned(client, 300)
    assert plan["allowed_ms"] == pytest.approx(150_000, rel=1e-3)
    assert plan["chosen"] == planned(client, 300)["chosen"] == "middle"


@pytest.mark.parametrize("seconds", [1000, 300, 50])
@pytest.mark.parametrize("ahead", [None, "slow", "fast"])
def test_a_request_gets_what_was_planned(
    client: TestClient, pipeline: Pipeline, seconds: float, ahead: str | None
) -> None:
    if ahead is None:
        plan, choice = planned(client, seconds), chosen(client, seconds)
    else:
        # The engine is idle in truth: admission knows of work that never comes.
        with waiting(pipeline, ahead):
            plan = planned(client, seconds)
            if not plan["in_time"]:
                refused = client.post(f"/v1/classify?model=rungs&deadline_ms={1000 * seconds}", content=picture(1))
                assert refused.status_code == 429
                return
            choice = chosen(client, seconds)
    assert (choice["model"], choice["reason"]) == (plan["chosen"], plan["reason"])
    of = {rung["model"]: rung for rung in plan["rungs"]}
    assert choice["predicted_ms"] == pytest.approx(of[choice["model"]]["predicted_ms"], rel=1e-3)
    for skipped in choice["skipped"]:
        assert skipped["predicted_ms"] == pytest.approx(of[skipped["model"]]["predicted_ms"], rel=1e-3)
        assert of[skipped["model"]]["why"] in ("late", "headroom")


def test_the_headroom_that_a_step_back_up_needs_is_that_of_requests_and_not_of_plans(
    client: TestClient, pipeline: Pipeline
) -> None:
    assert chosen(client, 1000)["model"] == "slow"
    with waiting(pipeline, "slow"):
        # It takes 800 s, of which 400 s are waiting; what is more urgent goes before.
        assert planned(client, 150)["chosen"] == "middle"
        assert planned(client, 900)["chosen"] == "slow", "the plan before was for no request"
    assert chosen(client, 150)["model"] == "middle"
    with waiting(pipeline, "slow"):
        for _ in range(2):
            plan = planned(client, 900)
            assert (plan["chosen"], plan["reason"], whys(plan)["slow"]) == ("middle", "headroom", "headroom")
        choice = chosen(client, 900)
        assert (choice["model"], choice["reason"]) == ("middle", "headroom")


def test_many_images_and_large_ones_take_longer(client: TestClient) -> None:
    assert planned(client, 1e4, images=3)["rungs"][-1]["predicted_ms"] == pytest.approx(60_000, rel=1e-3)
    small, large = (planned(client, 1e4, pixels=pixels)["rungs"][-1]["compute_ms"] for pixels in (0, 10**9))
    assert large > small + 1000


def test_a_plan_is_not_counted_and_takes_no_place(client: TestClient, pipeline: Pipeline) -> None:
    chosen(client, 150)

    def state() -> list[str]:
        rows = client.get("/metrics").text.splitlines()
        # Of this request, or of the time that has passed.
        own = (
            'route="/v1/families',
            'route="/metrics"',
            "_peak_memory",
            "_lag_",
            "_megapixel_",
            "_slowdown_",
        )
        return [row for row in rows if row.startswith("stridevit_") and not any(part in row for part in own)]

    before = state()
    assert any("stridevit_choices_total" in row for row in before)
    for seconds in (1000, 150, 1):
        planned(client, seconds)
    assert state() == before
    for model in pipeline.registry.ready:
        assert not any(model.queue.backlog.coming)
    assert not pipeline.admission.pressed


@pytest.mark.parametrize(
    ("path", "status", "detail"),
    [
        ("/v1/families/nobody/plan", 404, "families: rungs"),
        ("/v1/families/slow/plan", 404, "is a model, not a family"),
        ("/v1/families/rungs/plan?deadline_ms=0", 422, "deadline_ms"),
        ("/v1/families/rungs/plan?images=0", 422, "images"),
        ("/v1/families/rungs/plan?images=1001", 422, "images"),
        ("/v1/families/rungs/plan?deadline=5", 422, "did you mean 'deadline_ms'?"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(client: TestClient, path: str, status: int, detail: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert detail in answer.json()["detail"]
