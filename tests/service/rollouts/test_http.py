"""What clients and operators see of rollouts, over HTTP."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.errors import StartupError
from service.pipeline import Pipeline
from service.settings import Settings
from service.status import MAX_BYTES, Status
from tests.processes import wait_until
from tests.service.identity import picture, publish_identity
from tests.service.rollouts.conftest import DEADLINE_SECONDS, negated_graph


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    publish_identity(folder, "first", top1=0.5)
    publish_identity(folder, "second", top1=0.4, graph=negated_graph())
    publish_identity(folder, "first", top1=0.6)
    broken = publish_identity(folder, "first", top1=0.7)
    (broken / "model.onnx").write_bytes(b"no model")
    return folder


@pytest.fixture(scope="module")
def client(repository: Path) -> Iterator[TestClient]:
    options = Settings(
        repository=repository,
        threads=1,
        canary=("first@2=50%",),
        shadow=("identity:second=100%", "first@3=100%"),
        default_deadline_ms=DEADLINE_SECONDS * 1000,
        max_deadline_ms=DEADLINE_SECONDS * 1000,
    )
    with TestClient(create_app(options)) as session:
        yield session


def pipeline_of(client: TestClient) -> Pipeline:
    found = client.app.state.pipeline  # type: ignore[attr-defined]
    assert isinstance(found, Pipeline)
    return found


def numbers_in_share(client: TestClient) -> tuple[int, int]:
    """A number whose picture belongs to the canary, and one whose does not."""
    rollouts = pipeline_of(client).rollouts
    assert rollouts is not None
    (canary,) = (rollout.split for rollout in rollouts.all if rollout.split.kind == "canary")
    inside = next(number for number in range(1, 200) if canary.takes([picture(number)]))
    outside = next(number for number in range(1, 200) if not canary.takes([picture(number)]))
    return inside, outside


def test_every_api_says_that_a_canary_answered(client: TestClient) -> None:
    inside, outside = (picture(number) for number in numbers_in_share(client))
    answered = client.post("/v1/classify?model=first", content=inside)
    assert answered.headers["X-StrideViT-Model"] == "first/2"
    assert answered.headers["X-StrideViT-Choice"] == "canary"
    assert (answered.json()["version"], answered.json()["choice"]["reason"]) == (2, "canary")
    other = client.post("/v1/classify?model=first", content=outside)
    assert (other.headers["X-StrideViT-Model"], other.json()["choice"]) == ("first/1", None)
    assert client.post("/v1/classify?model=first&version=1", content=inside).json()["version"] == 1
    assert client.post("/hf/first", content=inside).headers["X-StrideViT-Model"] == "first/2"
    head = {"Inference-Header-Content-Length": "0"}
    by_name = [client.post("/v2/models/first/infer", content=bytes([number] * 12), headers=head) for number in range(9)]
    assert {answer.headers["X-StrideViT-Model"] for answer in by_name} == {"first/1", "first/2"}
    answer = client.post("/v2/models/first/versions/1/infer", content=bytes(12), headers=head)
    assert answer.headers["X-StrideViT-Model"] == "first/1"


def test_a_comparison_is_not_split(client: TestClient) -> None:
    inside, _ = numbers_in_share(client)
    lines = client.post("/v1/compare?models=first", content=picture(inside)).text
    assert '"version":1' in lines.replace(" ", "")
    assert '"version":2' not in lines.replace(" ", "")


def test_status_and_metrics_say_the_same_in_few_bytes(client: TestClient) -> None:
    for number in range(1, 21):
        assert client.post("/v1/classify?model=identity", content=picture(number)).status_code == 200
        assert client.post("/v1/classify?model=first", content=picture(number)).status_code == 200
    spare = pipeline_of(client).scheduler.spare
    assert spare is not None
    # What is compared is put there after an answer; by the next answer it has been.
    client.get("/healthz")
    wait_until(lambda: not spare.images)
    answer = client.get("/v1/status")
    assert len(answer.content) <= MAX_BYTES
    rollouts = {rollout.candidate: rollout for rollout in Status.model_validate(answer.json()).rollouts}
    assert set(rollouts) == {"first@2", "second", "first@3"}
    text = client.get("/metrics").text
    for title, kind, primary in (("first@2", "canary", "first"), ("second", "shadow", "identity")):
        labels = f'kind="{kind}",rollout="{primary}:{title}"'
        agree = f'stridevit_rollout_compared_total{{{labels},top1="agree"}} {float(rollouts[title].agree)}'
        assert agree in text
        assert rollouts[title].compared > 0
    assert (rollouts["second"].compared, rollouts["second"].agree) == (20, 0)
    broken = rollouts["first@3"]
    assert broken.state.startswith("unavailable: ")
    assert broken.compared == broken.candidate_images == 0
    assert broken.dropped > 0
    assert "stridevit_rollout_pending_bytes 0.0" in text


def test_a_broken_candidate_does_not_keep_the_service_from_starting_but_a_missing_one_does(repository: Path) -> None:
    for text, says in (
        ("nobody=5%", "no model 'nobody' here"),
        ("first@7=5%", "model 'first' has no version 7 here"),
    ):
        with pytest.raises(StartupError, match=says):
            create_app(Settings(repository=repository, threads=1, models=("first",), shadow=(text,)))


def test_without_flags_nothing_of_it_is_there(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "second", tmp_path / "second")
    with TestClient(create_app(Settings(repository=tmp_path, threads=1))) as session:
        assert pipeline_of(session).rollouts is None
        assert pipeline_of(session).scheduler.spare is None
        assert session.post("/v1/classify", content=picture(1)).status_code == 200
        assert "rollouts" not in session.get("/v1/status").json()
        assert 'rollout="' not in session.get("/metrics").text
