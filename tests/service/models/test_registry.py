"""What is served: verified versions only, exchanged while serving, without losing an answer."""

import asyncio
import gc
import itertools
import random
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.app import create_app, make_pipeline
from service.bundle import versions
from service.errors import BundleError, ImageError, NotReady, StartupError, UnknownModel
from service.host import resident_bytes
from service.http.client import Client
from service.metrics import Metrics
from service.pipeline import Answer, Inputs, Pipeline, RequestOptions
from service.scheduling.admission import Place
from service.scheduling.room import Room
from service.scheduling.scheduler import Output
from service.settings import Settings
from tests.processes import PATIENCE_SECONDS
from tests.service.conftest import PNG, images_waiting, resum
from tests.service.identity import number_in, picture, publish_identity


def drive(
    repository: Path, scenario: Callable[[Pipeline], Awaitable[None]], *, limit: float = 120, **settings: object
) -> None:
    """Run a scenario against a started classifier over `repository`."""

    async def run() -> None:
        classifier = make_pipeline(Settings(repository=repository, threads=1, **settings), Metrics())  # type: ignore[arg-type]
        classifier.start()
        try:
            await asyncio.wait_for(scenario(classifier), limit)
        finally:
            classifier.registry.close()
            await classifier.close()

    asyncio.run(run())


async def ask(classifier: Pipeline, number: int, *, model: str = "identity-a", image: bytes | None = None) -> int:
    """The answer of a model to the picture of a number. Raises the error of its request."""

    async def read(_: Place) -> Inputs:
        return Inputs(images=[image or picture(number)])

    def write(answer: Answer) -> int:
        (output,) = answer.images
        assert isinstance(output, Output)
        return number_in(output.logits)

    answered, _ = await classifier.answer(
        RequestOptions(model=model),
        arrived_at=time.perf_counter(),
        read=read,
        write=write,
        watching=Client().watched,
    )
    return answered


def states(classifier: Pipeline) -> dict[tuple[str, int | None], str]:
    return {(entry.name, entry.version): entry.state for entry in classifier.registry.index}


def test_a_broken_model_is_left_out_and_says_why(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    shutil.copytree(copy / "digits-csra-r2", copy / "digits-broken")
    with TestClient(create_app(Settings(repository=copy, threads=1))) as client:
        listed = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
        assert listed["digits-csra-r2"]["state"] == "ready"
        assert listed["digits-broken"]["state"] == "unavailable"
        assert "names 'digits-csra-r2'" in listed["digits-broken"]["reason"]
        assert str(tmp_path) not in str(listed)
        missing = client.post("/v1/classify?model=digits-broken", content=PNG)
        assert (missing.status_code, "unavailable" in missing.json()["detail"]) == (404, True)
    with pytest.raises(StartupError, match="digits-broken"):
        create_app(Settings(repository=copy, models=("digits-broken",), threads=1))
    (copy / "digits-csra-r2" / "1" / "model.onnx").write_bytes(b"x")
    with pytest.raises(StartupError, match="no model can be served"):
        create_app(Settings(repository=copy, threads=1))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("golden.npz", b"PK\x03\x04garbage"),
        ("golden.npz", b""),
        ("labels.txt", b"\xff\n" * 10),
        ("model.onnx", b"not a model"),
        ("manifest.json", b"{}"),
    ],
)
def test_a_bundle_broken_with_right_digests_is_left_out_too(file: str, content: bytes, tmp_path: Path) -> None:
    broken = publish_identity(tmp_path, "identity-a")
    publish_identity(tmp_path, "identity-b")
    (broken / file).write_bytes(content)
    resum(broken)

    async def scenario(classifier: Pipeline) -> None:
        assert states(classifier) == {("identity-a", 1): "unavailable", ("identity-b", 1): "ready"}

    drive(tmp_path, scenario)


def test_a_default_model_that_is_not_there_is_an_error(repository: Path) -> None:
    with pytest.raises(StartupError, match="default_model 'x'"):
        create_app(Settings(repository=repository, default_model="x", threads=1))


def test_an_alias_stands_for_the_default_model_unless_a_model_or_family_has_that_name(tmp_path: Path) -> None:
    publish_identity(tmp_path, "identity-a")
    publish_identity(tmp_path, "identity-b", top1=0.9)

    async def with_a_name_of_its_own(classifier: Pipeline) -> None:
        registry = classifier.registry
        assert registry.find("birds").name == registry.find(None).name == "identity-a"
        assert registry.find("birds", 1).name == "identity-a"
        assert [model.name for model in registry.serving("birds")] == ["identity-a"]
        assert await ask(classifier, 5, model="birds") == 5
        with pytest.raises(UnknownModel, match="no model 'bees' here"):
            registry.find("bees")
        await registry.unload("identity-a")
        with pytest.raises(UnknownModel, match="'identity-a' is unavailable"):
            registry.find("birds")

    drive(tmp_path, with_a_name_of_its_own, default_model="identity-a", alias="birds")

    async def with_a_name_that_is_taken(classifier: Pipeline) -> None:
        assert classifier.registry.find("identity-b").name == "identity-b"
        await classifier.registry.unload("identity-b")
        with pytest.raises(UnknownModel, match="'identity-b' is unavailable"):
            classifier.registry.find("identity-b")

    drive(tmp_path, with_a_name_that_is_taken, default_model="identity-a", alias="identity-b")

    async def with_the_name_of_a_family(classifier: Pipeline) -> None:
        family, members = classifier.registry.candidates("identity")
        assert family is not None
        assert len(members) == 2

    drive(tmp_path, with_the_name_of_a_family, alias="identity")


def test_a_broken_newest_version_leaves_the_one_before_serving(tmp_path: Path) -> None:
    publish_identity(tmp_path)
    (publish_identity(tmp_path) / "model.onnx").write_bytes(b"x")

    async def scenario(classifier: Pipeline) -> None:
        assert states(classifier) == {("identity-a", 1): "ready", ("identity-a", 2): "unavailable"}
        assert await ask(classifier, 5) == 5

    drive(tmp_path, scenario)


def test_a_new_version_is_taken_in_and_the_old_one_retired(tmp_path: Path) -> None:
    publish_identity(tmp_path)

    async def scenario(classifier: Pipeline) -> None:
        publish_identity(tmp_path)
        assert classifier.registry.find("identity-a").version == 1, "the repository has not been scanned yet"
        await classifier.registry.refresh()
        assert classifier.registry.find("identity-a").version == 2
        assert states(classifier) == {("identity-a", 2): "ready"}
        assert await ask(classifier, 5) == 5
        with pytest.raises(UnknownModel, match="has no version 1 here; there are: 2"):
            classifier.registry.find("identity-a", 1)

    drive(tmp_path, scenario)


def test_several_versions_can_serve_side_by_side(tmp_path: Path) -> None:
    for _ in range(3):
        publish_identity(tmp_path)

    async def scenario(classifier: Pipeline) -> None:
        assert states(classifier) == {("identity-a", 2): "ready", ("identity-a", 3): "ready"}
        assert classifier.registry.find("identity-a").version == 3
        assert classifier.registry.find("identity-a", 2).version == 2
        publish_identity(tmp_path)
        await classifier.registry.refresh()
        assert states(classifier) == {("identity-a", 3): "ready", ("identity-a", 4): "ready"}

    drive(tmp_path, scenario, versions_to_serve=2)


def test_a_broken_new_version_leaves_the_old_one_serving_and_says_why(tmp_path: Path) -> None:
    publish_identity(tmp_path)

    async def scenario(classifier: Pipeline) -> None:
        broken = publish_identity(tmp_path)
        (broken / "model.onnx").write_bytes(b"x")
        for _ in range(2):
            await classifier.registry.refresh()
        with pytest.raises(BundleError, match="sha256"):
            await classifier.registry.load("identity-a")
        assert await ask(classifier, 5) == 5
        assert states(classifier) == {("identity-a", 1): "ready", ("identity-a", 2): "unavailable"}
        (reason,) = [entry.reason for entry in classifier.registry.index if entry.version == 2]
        assert "sha256" in reason
        assert str(tmp_path) not in reason

    drive(tmp_path, scenario)


def test_a_version_damaged_while_it_serves_goes_on_and_says_so_when_it_is_reloaded(tmp_path: Path) -> None:
    folder = publish_identity(tmp_path)

    async def scenario(classifier: Pipeline) -> None:
        (folder / "labels.txt").write_text("x\n")
        with pytest.raises(BundleError, match=r"labels\.txt"):
            await classifier.registry.load("identity-a")
        (entry,) = classifier.registry.index
        assert (entry.state, "not reloaded" in entry.reason) == ("ready", True)
        assert await ask(classifier, 5) == 5

    drive(tmp_path, scenario)


def test_what_is_removed_from_the_repository_is_retired(tmp_path: Path) -> None:
    publish_identity(tmp_path, "identity-a")
    publish_identity(tmp_path, "identity-b")

    async def scenario(classifier: Pipeline) -> None:
        shutil.rmtree(tmp_path / "identity-a")
        await classifier.registry.refresh()
        assert states(classifier) == {("identity-b", 1): "ready"}

    drive(tmp_path, scenario)


def test_an_unloaded_model_answers_what_it_accepted_and_comes_back_when_asked(tmp_path: Path) -> None:
    publish_identity(tmp_path, work=20)
    publish_identity(tmp_path, "identity-b")

    async def scenario(classifier: Pipeline) -> None:
        asked = [asyncio.create_task(ask(classifier, number)) for number in range(50)]
        await asyncio.sleep(0)
        await classifier.registry.unload("identity-a")
        assert await asyncio.gather(*asked) == list(range(50))
        with pytest.raises(UnknownModel, match="'identity-a' is unavailable: unloaded"):
            await ask(classifier, 1)
        await classifier.registry.refresh()
        assert states(classifier)["identity-a", 1] == "unavailable", "scanning the repository does not load it again"
        await classifier.registry.load("identity-a")
        assert await ask(classifier, 1) == 1

    drive(tmp_path, scenario)


@pytest.mark.parametrize(
    "error", [NotReady("the engine hangs"), RuntimeError("the engine thread has ended"), OSError("CUDA error 700")]
)
def test_an_engine_that_cannot_be_closed_keeps_no_other_from_being_retired(error: Exception, tmp_path: Path) -> None:
    for _ in range(2):
        publish_identity(tmp_path)

    def fail() -> None:
        raise error

    async def scenario(classifier: Pipeline) -> None:
        for model in classifier.registry.serving("identity-a"):
            model.engines.close = fail  # type: ignore[method-assign]
        await classifier.registry.unload("identity-a")
        assert states(classifier) == {("identity-a", 1): "unavailable", ("identity-a", 2): "unavailable"}
        assert classifier.scheduler.queues == []

    drive(tmp_path, scenario, versions_to_serve=2)


@pytest.mark.parametrize("name", ["nobody", "../identity-a", ".", "identity-a/1", ""])
def test_only_what_the_repository_lists_can_be_loaded(name: str, tmp_path: Path) -> None:
    publish_identity(tmp_path)

    async def scenario(classifier: Pipeline) -> None:
        with pytest.raises(UnknownModel):
            await classifier.registry.load(name)
        with pytest.raises(UnknownModel):
            await classifier.registry.unload(name)

    drive(tmp_path, scenario)


def test_the_settings_bound_what_can_be_loaded(tmp_path: Path) -> None:
    publish_identity(tmp_path, "identity-a")
    publish_identity(tmp_path, "identity-b")

    async def scenario(classifier: Pipeline) -> None:
        with pytest.raises(UnknownModel, match="serve only: identity-a"):
            await classifier.registry.load("identity-b")

    drive(tmp_path, scenario, models=("identity-a",))


def test_a_family_holds_models_that_can_replace_each_other(tmp_path: Path) -> None:
    publish_identity(tmp_path, "identity-a", top1=0.5)
    publish_identity(tmp_path, "identity-b", top1=0.7)
    publish_identity(tmp_path, "identity-random", top1=None)
    publish_identity(tmp_path, "identity-other-labels", top1=0.6, labels=tuple("abcdefghijkl"))
    publish_identity(tmp_path, "stranger", top1=0.9, family="stranger")

    async def scenario(classifier: Pipeline) -> None:
        families = {name: [m.name for m in ladder] for name, ladder in classifier.registry.families.items()}
        assert families["identity"] == ["identity-b", "identity-a"]
        assert await ask(classifier, 7, model="identity") == 7
        assert classifier.registry.candidates("stranger")[0] is None, "a model's own name comes before its family's"

    drive(tmp_path, scenario)


def test_no_answer_is_lost_or_swapped_under_cancellation_errors_and_reloads(tmp_path: Path) -> None:
    """Thousands of images that encode their number, through the real ONNX Runtime, while the model is exchanged."""
    publish_identity(tmp_path, work=1)
    chance = random.Random(0)  # noqa: S311 (the same sequence every time)

    async def scenario(classifier: Pipeline) -> None:
        classifier.admission.room = Room(max_images=10**6, max_bytes=10**9)
        reloading = asyncio.create_task(reload(classifier))
        tasks: list[tuple[int, str, asyncio.Task[int]]] = []
        for number in itertools.count():
            if number >= 4000:
                # Some for each reload, however long that takes.
                exchanged = len(reloads) > 2 and len(versions(tmp_path, "identity-a")) > 1
                if exchanged or reloading.done():
                    break
                await asyncio.sleep(0.01)
            fate = chance.choices(("stays", "cancelled", "bad"), (8, 1, 1))[0]
            image = b"not an image" if fate == "bad" else None
            task = asyncio.create_task(ask(classifier, number, image=image))
            tasks.append((number, fate, task))
            if chance.random() < 0.1:
                await asyncio.sleep(chance.random() * 0.005)
            if fate == "cancelled":
                asyncio.get_running_loop().call_later(chance.random() * 0.01, task.cancel)
        results = await asyncio.gather(*(task for _, _, task in tasks), return_exceptions=True)
        for (number, fate, _), result in zip(tasks, results, strict=True):
            if fate == "stays":
                assert result == number
            elif fate == "bad":
                assert isinstance(result, ImageError)
            else:
                assert result == number or isinstance(result, asyncio.CancelledError)
        assert not reloading.done(), "a reload has failed"
        reloading.cancel()
        with suppress(asyncio.CancelledError):
            await reloading
        assert classifier.admission.images == 0
        assert images_waiting(classifier.scheduler) == 0
        assert len(classifier.scheduler.queues) == 1

    reloads: list[str] = []

    async def reload(classifier: Pipeline) -> None:
        while True:
            if chance.random() < 0.3:
                publish_identity(tmp_path, work=chance.randrange(3))
                await classifier.registry.refresh()
                reloads.append("refreshed")
            else:
                await classifier.registry.load("identity-a")
                reloads.append("loaded")

    drive(
        tmp_path,
        scenario,
        limit=PATIENCE_SECONDS,
        max_batch=8,
        default_deadline_ms=600_000,
        max_deadline_ms=600_000,
    )


@pytest.mark.parametrize("reloads", [60, pytest.param(300, marks=pytest.mark.long)])
def test_reloads_do_not_leak_memory(reloads: int, tmp_path: Path) -> None:
    publish_identity(tmp_path, work=2)

    async def scenario(classifier: Pipeline) -> None:
        sizes: list[int] = []
        gc.freeze()  # collecting all that was imported so far would take most of the time
        for _ in range(30):
            for _ in range(reloads // 30):
                await classifier.registry.load("identity-a")
            gc.collect()
            sizes.append(resident_bytes())
        gc.unfreeze()
        assert await ask(classifier, 9) == 9
        assert len(classifier.scheduler.queues) == 1
        # The first third fills caches. A session leaked at each reload would add more than a megabyte each time.
        assert max(sizes[20:]) - max(sizes[:10]) < 8_000_000, sizes

    drive(tmp_path, scenario, limit=280, max_batch=2)
