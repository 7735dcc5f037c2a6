"""A repository that changes, or cannot be read for a while, under a service that goes on."""

import asyncio
import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.bundle import versions
from service.errors import BundleError, EngineError, NotNow, NotReady, UnknownModel
from service.models import registry
from service.models.failures import Failures
from service.pipeline import Pipeline
from service.settings import Settings
from tests.processes import wait_until
from tests.service.conftest import until
from tests.service.identity import publish_identity
from tests.service.models.hostile import publish_endless, trials
from tests.service.models.test_registry import ask, drive, states


def reason(classifier: Pipeline, name: str, version: int | None) -> str:
    (found,) = [entry.reason for entry in classifier.registry.index if (entry.name, entry.version) == (name, version)]
    return found


def test_a_version_found_half_written_is_taken_once_it_is_whole(tmp_path: Path) -> None:
    publish_identity(tmp_path)

    async def scenario(classifier: Pipeline) -> None:
        whole = publish_identity(tmp_path / "elsewhere")
        half = tmp_path / "identity-a" / "2"
        half.mkdir()
        for file in ("SHA256SUMS", "labels.txt", "golden.npz", "manifest.json"):
            shutil.copy(whole / file, half)
        await classifier.registry.refresh()
        assert states(classifier) == {("identity-a", 1): "ready", ("identity-a", 2): "unavailable"}
        assert reason(classifier, "identity-a", 2) == "identity-a/2/model.onnx: missing"
        await classifier.registry.refresh()
        assert classifier.registry.loads["failed"] == 1, "it is not tried again while it is unchanged"
        (half / "model.onnx").write_bytes((whole / "model.onnx").read_bytes()[:100])
        await classifier.registry.refresh()
        assert "model.onnx: sha256 is" in reason(classifier, "identity-a", 2)
        shutil.copy(whole / "model.onnx", half)
        await classifier.registry.refresh()
        assert states(classifier) == {("identity-a", 2): "ready"}
        assert await ask(classifier, 5) == 5

    drive(tmp_path, scenario)


def test_a_broken_version_that_is_removed_leaves_the_index(tmp_path: Path) -> None:
    publish_identity(tmp_path)

    async def scenario(classifier: Pipeline) -> None:
        broken = publish_identity(tmp_path)
        (broken / "model.onnx").unlink()
        await classifier.registry.refresh()
        assert states(classifier)["identity-a", 2] == "unavailable"
        shutil.rmtree(broken)
        publish_identity(tmp_path, "identity-b").rename(tmp_path / "misnamed")
        (tmp_path / "identity-b" / "1").mkdir()
        await classifier.registry.refresh()
        assert states(classifier) == {("identity-a", 1): "ready", ("identity-b", 1): "unavailable"}
        shutil.rmtree(tmp_path / "identity-b")
        await classifier.registry.refresh()
        assert states(classifier) == {("identity-a", 1): "ready"}

    drive(tmp_path, scenario)


def test_a_folder_that_cannot_be_listed_concerns_itself_alone(tmp_path: Path) -> None:
    """A link to itself: like missing rights, which do not stop root."""
    publish_identity(tmp_path, "identity-a")
    (tmp_path / "identity-b").symlink_to("identity-b")

    async def scenario(classifier: Pipeline) -> None:
        assert states(classifier) == {("identity-a", 1): "ready", ("identity-b", None): "unavailable"}
        assert "its folder cannot be listed" in reason(classifier, "identity-b", None)
        assert str(tmp_path) not in reason(classifier, "identity-b", None)
        publish_identity(tmp_path, "identity-c")
        await classifier.registry.refresh()
        assert states(classifier)["identity-c", 1] == "ready", "polling goes on for all others"
        assert not classifier.registry.readable
        with pytest.raises(BundleError, match="its folder cannot be listed"):
            await classifier.registry.load("identity-b")
        (tmp_path / "identity-b").unlink()
        publish_identity(tmp_path, "identity-b")
        await classifier.registry.refresh()
        assert ("identity-b", None) not in states(classifier)
        assert states(classifier)["identity-b", 1] == "ready"
        assert classifier.registry.readable

    drive(tmp_path, scenario)


def test_a_folder_that_can_no_longer_be_listed_takes_nothing_away_that_serves(tmp_path: Path) -> None:
    publish_identity(tmp_path, "identity-a")
    publish_identity(tmp_path, "identity-b")

    async def scenario(classifier: Pipeline) -> None:
        (tmp_path / "identity-a").rename(tmp_path / ".aside")
        (tmp_path / "identity-a").symlink_to("identity-a")
        await classifier.registry.refresh()
        assert await ask(classifier, 5) == 5
        (tmp_path / "identity-a").unlink()
        (tmp_path / ".aside").rename(tmp_path / "identity-a")
        await classifier.registry.refresh()
        assert states(classifier) == {("identity-a", 1): "ready", ("identity-b", 1): "ready"}

    drive(tmp_path, scenario)


def test_a_repository_that_vanishes_for_a_while_takes_nothing_away_that_serves(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    publish_identity(repository)

    async def scenario(classifier: Pipeline) -> None:
        repository.rename(tmp_path / "aside")
        await classifier.registry.refresh()
        assert (await ask(classifier, 5), classifier.registry.readable) == (5, False)
        repository.mkdir()  # a mount point without its mount
        await classifier.registry.refresh()
        assert (await ask(classifier, 6), classifier.registry.readable) == (6, False)
        repository.rmdir()
        (tmp_path / "aside").rename(repository)
        publish_identity(repository)
        await classifier.registry.refresh()
        assert states(classifier) == {("identity-a", 2): "ready"}
        assert classifier.registry.readable

    drive(repository, scenario)


@pytest.mark.parametrize("leaves_a_mount_point", [False, True])
def test_a_repository_that_vanishes_during_a_scan_takes_nothing_away_that_serves(
    leaves_a_mount_point: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    publish_identity(repository)

    def vanish(folder: Path, name: str) -> list[int]:
        repository.rename(tmp_path / "aside")
        if leaves_a_mount_point:
            repository.mkdir()
        return versions(folder, name)

    async def scenario(classifier: Pipeline) -> None:
        monkeypatch.setattr(registry, "versions", vanish)
        await classifier.registry.refresh()
        assert await ask(classifier, 5) == 5
        assert "its folder cannot be listed" in reason(classifier, "identity-a", None)
        monkeypatch.undo()
        shutil.rmtree(repository, ignore_errors=True)
        (tmp_path / "aside").rename(repository)
        await classifier.registry.refresh()
        assert states(classifier) == {("identity-a", 1): "ready"}

    drive(repository, scenario)


def test_while_one_model_is_being_loaded_others_answer_and_can_be_unloaded(tmp_path: Path) -> None:
    publish_identity(tmp_path, "identity-a")
    publish_identity(tmp_path, "identity-b")

    async def scenario(classifier: Pipeline) -> None:
        publish_endless(tmp_path, "identity-a")
        loading = asyncio.create_task(classifier.registry.load("identity-a"))
        await until(lambda: states(classifier).get(("identity-a", 2)) == "loading" and bool(trials()))
        assert await ask(classifier, 5) == 5
        await classifier.registry.unload("identity-b")
        with pytest.raises(UnknownModel, match="unloaded"):
            await ask(classifier, 5, model="identity-b")
        assert not loading.done()
        classifier.registry.close()
        with pytest.raises(NotReady, match="shutting down"):
            await loading
        assert await ask(classifier, 7) == 7, "what serves goes on serving"
        assert trials() == []

    drive(tmp_path, scenario)


def test_a_poll_beside_an_unload_does_not_load_the_model_again(tmp_path: Path) -> None:
    publish_identity(tmp_path)

    async def scenario(classifier: Pipeline) -> None:
        async with classifier.registry._exchange["identity-a"]:  # as while another version is being loaded
            unloading = asyncio.create_task(classifier.registry.unload("identity-a"))
            await asyncio.sleep(0)
            polling = asyncio.create_task(classifier.registry.refresh())
            # The poll has chosen its models once it lets others load, or waits for the one that is held.
            await until(lambda: polling.done() or len(waiters(classifier)) > 1)
        await asyncio.gather(unloading, polling)
        assert states(classifier) == {("identity-a", 1): "unavailable"}

    def waiters(classifier: Pipeline) -> list[object]:
        return list(classifier.registry._exchange["identity-a"]._waiters or ())

    drive(tmp_path, scenario)


def test_a_version_for_which_memory_was_short_is_tried_again_once_there_is_enough(tmp_path: Path) -> None:
    left = 100
    failures = Failures(lambda: left)
    key = "identity-a", 2
    assert failures.worth_trying(key, tmp_path)
    assert failures.record(key, None, NotNow("short", needed_bytes=200)), "news"
    assert not failures.record(key, None, NotNow("short", needed_bytes=200)), "no news"
    folder = tmp_path / "nowhere"
    assert not failures.worth_trying(key, folder)
    left = 200
    assert failures.worth_trying(key, folder)
    failures.record(key, None, BundleError("broken"))
    assert not failures.worth_trying(key, folder)
    failures.forget(key)
    assert failures.worth_trying(key, folder)


def caused_by(cause: Exception) -> BundleError:
    error = BundleError("model.onnx: cannot be read")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("left", [None, 1 << 40])
@pytest.mark.parametrize(
    "error",
    [
        NotReady("the engine hangs"),
        OSError(errno.EMFILE, "Too many open files"),
        caused_by(OSError(errno.ESTALE, "Stale file handle")),
        caused_by(MemoryError()),
        EngineError("ONNX Runtime cannot run the model on cpu: std::bad_alloc"),
        NotNow("the process cannot be started"),
    ],
)
def test_a_failure_of_the_moment_is_tried_again_at_polls_that_become_rare(
    error: Exception, left: int | None, tmp_path: Path
) -> None:
    failures, tried = Failures(lambda: left), list[int]()
    key, folder = ("identity-a", 2), tmp_path / "nowhere"
    failures.record(key, None, error)
    for poll in range(1, 200):
        if failures.worth_trying(key, folder):
            tried.append(poll)
            failures.record(key, None, error)
    assert tried == [1, 3, 7, 15, 31, 63, 127, 191]


@pytest.mark.parametrize(
    "error", [caused_by(PermissionError(errno.EACCES, "Permission denied")), EngineError("no such operator")]
)
def test_a_failure_of_the_bundle_is_final_while_its_folder_is_unchanged(error: Exception, tmp_path: Path) -> None:
    failures = Failures(lambda: None)
    failures.record(("identity-a", 2), None, error)
    assert not any(failures.worth_trying(("identity-a", 2), tmp_path / "nowhere") for _ in range(200))


def test_where_the_memory_that_is_left_is_unknown_a_lack_of_it_is_not_tried_again_at_every_poll(tmp_path: Path) -> None:
    failures = Failures(lambda: None)
    key, error = ("identity-a", 2), NotNow("short", needed_bytes=200)
    failures.record(key, None, error)
    failures.record(key, None, error)
    assert [failures.worth_trying(key, tmp_path / "nowhere") for _ in range(2)] == [False, True]


def test_several_versions_are_in_the_policy_and_in_the_statistics(tmp_path: Path) -> None:
    for _ in range(2):
        publish_identity(tmp_path)
    app = create_app(Settings(repository=tmp_path, threads=1, max_batch=2, versions_to_serve=2))
    with TestClient(app) as client:
        config = client.get("/v2/models/identity-a/config").json()
        assert config["version_policy"] == {"latest": {"num_versions": 2}}

        def counted(path: str) -> list[str]:
            return [entry["version"] for entry in client.get(f"/v2/models/{path}/stats").json()["model_stats"]]

        assert counted("identity-a") == ["1", "2"]
        assert counted("identity-a/versions/1") == ["1"]
        assert counted("identity") == ["2"], "a family has the newest version of each member"
        metrics = client.get("/metrics").text
        assert 'stridevit_model_loads_total{outcome="ready"} 2.0' in metrics
        assert "stridevit_repository_readable 1.0" in metrics


def test_a_fifo_in_a_bundle_does_not_keep_others_from_being_loaded(tmp_path: Path) -> None:
    publish_identity(tmp_path, "identity-a")
    fifo = publish_identity(tmp_path, "identity-b") / "SHA256SUMS"
    fifo.unlink()
    os.mkfifo(fifo)
    before = threading.active_count()

    async def scenario(classifier: Pipeline) -> None:
        assert states(classifier) == {("identity-a", 1): "ready", ("identity-b", 1): "unavailable"}
        assert "SHA256SUMS: is a FIFO, not a file" in reason(classifier, "identity-b", 1)
        await classifier.registry.load("identity-a")

    drive(tmp_path, scenario)
    wait_until(lambda: threading.active_count() <= before)
