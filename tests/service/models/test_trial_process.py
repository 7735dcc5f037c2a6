"""A service on a real socket, while a version is being loaded that never ends."""

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.processes import PATIENCE_SECONDS, post, serving, still_running, wait_until
from tests.service.identity import picture, publish_identity
from tests.service.models.hostile import publish_endless, trials_of

POLLING = {
    "STRIDEVIT_POLL_SECONDS": "0.1",
    "STRIDEVIT_LOAD_TIMEOUT_SECONDS": "3600",
    "STRIDEVIT_THREADS": "1",
}


def hang(repository: Path, url: str, process: "subprocess.Popen[str]") -> psutil.Process:
    """Publish a version that never ends: the process that proves it, once the service has said that it loads it."""
    publish_endless(repository)

    def loading() -> bool:
        entries = post(url + "/v2/repository/index", b"").json()
        return any((entry["version"], entry["state"]) == ("2", "LOADING") for entry in entries)

    service = psutil.Process(process.pid)
    wait_until(lambda: loading() and bool(trials_of(service)), process)
    (trial,) = trials_of(service)
    assert post(url + "/v1/classify", picture(7)).status_code == 200
    return trial


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_load_that_never_ends_does_not_keep_the_service_from_ending(end: signal.Signals, tmp_path: Path) -> None:
    publish_identity(tmp_path)
    with serving(tmp_path, environment=POLLING) as (url, process):
        trial = hang(tmp_path, url, process)
        process.send_signal(end)
        assert process.wait(PATIENCE_SECONDS) == 0
        assert still_running([trial]) == []


def test_a_trial_ends_with_the_service_even_if_that_is_killed(tmp_path: Path) -> None:
    publish_identity(tmp_path)
    with serving(tmp_path, environment=POLLING) as (url, process):
        trial = hang(tmp_path, url, process)
        process.kill()
        process.wait()
        wait_until(lambda: not still_running([trial]))
