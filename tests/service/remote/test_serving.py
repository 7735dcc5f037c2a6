"""The service over a bucket: start, polling, loading by request, outages, the end."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from loadtests.experiment.server import free_port
from service.app import create_app
from service.errors import BundleError, StartupError
from service.pipeline import Pipeline
from service.settings import Settings
from tests.processes import PATIENCE_SECONDS, ROOT, get, interruptible, post, serving, wait_until
from tests.service.identity import picture, publish_identity
from tests.service.models.test_registry import ask, drive, states
from tests.service.remote.conftest import SECRET, Bucket, FaultyServer


def reason(classifier: Pipeline, version: int) -> str:
    (found,) = [entry.reason for entry in classifier.registry.index if entry.version == version]
    return found


def publish(bucket: Bucket, folder: Path, *, top1: float = 0.5) -> None:
    publish_identity(folder, top1=top1)
    bucket.upload(folder)


def test_polling_takes_new_versions_and_a_wrong_one_never_replaces_what_serves(bucket: Bucket, tmp_path: Path) -> None:
    local = tmp_path / "local"
    publish(bucket, local)

    async def scenario(classifier: Pipeline) -> None:
        registry = classifier.registry
        publish(bucket, local)
        await registry.refresh()
        assert states(classifier) == {("identity-a", 2): "ready"}
        publish(bucket, local, top1=0.6)
        bucket.put("identity-a/3/manifest.json", b"wrong")
        await registry.refresh()
        assert states(classifier) == {("identity-a", 2): "ready", ("identity-a", 3): "unavailable"}
        assert reason(classifier, 3).startswith("identity-a/3/manifest.json: sha256 is")
        with pytest.raises(BundleError, match=r"identity-a/3/manifest\.json: sha256 is"):
            await registry.load("identity-a")
        assert await ask(classifier, 5) == 5
        bucket.upload(local)
        await registry.refresh()
        assert states(classifier) == {("identity-a", 3): "ready"}
        publish(bucket, local)
        await registry.load("identity-a")
        assert states(classifier) == {("identity-a", 4): "ready"}, "a load by request looks into the bucket first"
        publish_identity(local, "identity-b")
        bucket.upload(local)
        bucket.delete("identity-a/")
        await registry.refresh()
        assert states(classifier) == {("identity-b", 1): "ready"}

    drive(bucket.url, scenario, limit=PATIENCE_SECONDS, repository_cache=tmp_path / "cache")  # type: ignore[arg-type]


def test_an_outage_takes_nothing_away(bucket: Bucket, server: FaultyServer, tmp_path: Path) -> None:
    publish(bucket, tmp_path / "local")

    async def scenario(classifier: Pipeline) -> None:
        registry = classifier.registry
        assert registry.readable
        server.down = True
        await registry.refresh()
        assert (await ask(classifier, 5), registry.readable) == (5, False)
        await registry.unload("identity-a")
        await registry.load("identity-a")
        assert (await ask(classifier, 6), registry.readable) == (6, False), "what was fetched can be loaded again"
        server.down = False
        publish(bucket, tmp_path / "local")
        await registry.load("identity-a")
        assert states(classifier) == {("identity-a", 2): "ready"}
        await registry.refresh()
        assert registry.readable

    drive(bucket.url, scenario, limit=PATIENCE_SECONDS, repository_cache=tmp_path / "cache")  # type: ignore[arg-type]


def test_a_start_during_an_outage_serves_what_was_fetched(bucket: Bucket, server: FaultyServer, tmp_path: Path) -> None:
    publish(bucket, tmp_path / "local")
    settings = Settings(repository=bucket.url, repository_cache=tmp_path / "cache", threads=1)
    with TestClient(create_app(settings)):
        pass
    server.down = True
    with TestClient(create_app(settings)) as client:
        assert client.post("/v1/classify", content=picture(5)).status_code == 200
        assert "stridevit_repository_readable 0.0" in client.get("/metrics").text
    elsewhere = settings.model_copy(update={"repository_cache": tmp_path / "empty"})
    with pytest.raises(StartupError, match=r"s3://.* cannot be reached"):
        create_app(elsewhere)
    assert "repository" not in [thread.name for thread in threading.enumerate()]


def test_a_cache_that_cannot_be_written_to_is_an_error_that_names_the_setting(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = Settings(repository=bucket.url, repository_cache=tmp_path / "file")
    with pytest.raises(StartupError, match="--repository-cache"):
        create_app(settings)


@pytest.mark.slow
def test_the_service_over_a_bucket_answers_an_image(bucket: Bucket, tmp_path: Path) -> None:
    publish(bucket, tmp_path / "local")
    environment = {"STRIDEVIT_REPOSITORY_CACHE": str(tmp_path / "cache"), "STRIDEVIT_THREADS": "1"}
    with serving(bucket.url, environment=environment) as (url, process):  # type: ignore[arg-type]
        assert post(f"{url}/v1/classify", picture(7)).status_code == 200
        assert "stridevit_repository_readable 1.0" in get(f"{url}/metrics").text
        assert SECRET not in get(f"{url}/metrics").text + get(f"{url}/v1/status").text + get(f"{url}/v1/models").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
        assert process.stderr is not None
        log = process.stderr.read()
    assert "version fetched" in log
    assert SECRET not in log


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_during_the_first_download_leaves_nothing_half_written(
    number: signal.Signals, status: int, bucket: Bucket, tmp_path: Path
) -> None:
    publish(bucket, tmp_path / "local")
    reading, gone_on = threading.Event(), threading.Event()

    def hang(content: bytes) -> Iterable[bytes]:
        reading.set()
        gone_on.wait(PATIENCE_SECONDS)
        return [content]

    bucket.faults["model.onnx"] = hang
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "service", "--repository", bucket.url, "--port", str(free_port())]
    try:
        with interruptible(*command, STRIDEVIT_REPOSITORY_CACHE=str(cache)) as process:
            wait_until(reading.is_set, process)
            process.send_signal(number)
            assert process.wait(PATIENCE_SECONDS) == status
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
    finally:
        gone_on.set()
    (folder,) = cache.iterdir()
    assert [*(folder / "partial").iterdir(), *(folder / "models").iterdir()] == []


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", "check", "--threads", "1", "--max-batch", "1", *arguments]
    environment = {**os.environ, "COLUMNS": "300", **environment}
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


@pytest.mark.slow
def test_check_copies_the_repository_and_names_what_is_wrong_in_it(bucket: Bucket, tmp_path: Path) -> None:
    publish(bucket, tmp_path / "local")
    publish(bucket, tmp_path / "local")
    bucket.put("identity-a/2/labels.txt", b"wrong")
    ended = check("--repository", bucket.url, "--repository-cache", str(tmp_path / "cache"))
    assert ended.returncode == 1
    good, bad = ("good" in ended.stdout, "identity-a/2/labels.txt: sha256 is" in ended.stdout)
    assert (good, bad) == (True, True), ended.stdout
    missing = check("--repository", "s3://no-such-bucket/x", "--repository-cache", str(tmp_path / "cache"))
    assert missing.returncode == 1
    assert missing.stderr == (
        "error: there is no s3://no-such-bucket/x: create the bucket, or name another one with --repository\n"
    )


_WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({missing!r}))
from service.__main__ import app
app(["check", "--repository", {url!r}])
"""


@pytest.mark.parametrize(
    ("url", "missing", "message"),
    [
        ("s3://bucket/models", ["s3fs"], "needs s3fs: pip install 'stridevit[remote]'"),
        ("s3://bucket/models", ["fsspec"], "needs s3fs: pip install 'stridevit[remote]'"),
        ("gs://bucket/models", ["gcsfs"], "needs gcsfs: pip install 'stridevit[remote]' gcsfs"),
    ],
)
def test_without_the_extra_one_line_names_it(url: str, missing: list[str], message: str) -> None:
    script = _WITHOUT.format(missing=missing, url=url)
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert ended.returncode == 1
    scheme = url.partition(":")[0]
    assert ended.stderr == f"error: a repository at {scheme}:// {message}\n"


def test_a_service_over_a_folder_imports_none_of_it() -> None:
    script = (
        "import json, sys, service.app, service.__main__; "
        "print(json.dumps(sorted({'fsspec', 's3fs', 'httpx', 'aiohttp', 'botocore'} & set(sys.modules))))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert json.loads(ended.stdout) == []


def test_the_event_loop_goes_on_while_something_is_fetched(bucket: Bucket, tmp_path: Path) -> None:
    publish(bucket, tmp_path / "local")
    reading, gone_on = threading.Event(), threading.Event()

    def hang(content: bytes) -> Iterable[bytes]:
        reading.set()
        gone_on.wait(PATIENCE_SECONDS)
        return [content]

    async def scenario(classifier: Pipeline) -> None:
        publish_identity(tmp_path / "local", labels=tuple("abcdefghijkl"))
        bucket.upload(tmp_path / "local")
        bucket.faults["2/labels.txt"] = hang
        polling = asyncio.create_task(classifier.registry.refresh())
        await asyncio.to_thread(reading.wait, PATIENCE_SECONDS)
        assert await ask(classifier, 5) == 5
        assert not polling.done()
        gone_on.set()
        await polling
        assert states(classifier) == {("identity-a", 2): "ready"}

    try:
        drive(bucket.url, scenario, limit=PATIENCE_SECONDS, repository_cache=tmp_path / "cache")  # type: ignore[arg-type]
    finally:
        gone_on.set()
