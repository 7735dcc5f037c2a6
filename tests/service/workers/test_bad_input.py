"""What cannot start says why, in one line that names the fix."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from loadtests.experiment.server import free_port
from tests.processes import PATIENCE_SECONDS, ROOT
from tests.service.workers.served import command, pretend


def ended(words: list[str], environment: dict[str, str] | None = None) -> tuple[int, list[str]]:
    """Exit status and errors of a service that does not start."""
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    return done.returncode, [line["event"] for line in lines if line["level"] == "error"]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--port", "0"], "workers need a fixed port, which all of them serve: set port, such as --port 8000"),
        (["--workers", "many"], "workers (from flag --workers): 'many' is neither a number of processes nor auto"),
        (["--workers", "-2"], "workers (from flag --workers): '-2' is neither a number of processes nor auto"),
    ],
)
def test_settings_that_do_not_fit_are_refused(flags: list[str], error: str) -> None:
    assert ended(command(Path("models"), 8000, *flags)) == (2, [error])


def test_a_port_in_use_is_named_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, errors = ended(command(Path("models"), port))
    assert (status, errors) == (
        1,
        [f"port {port} of 127.0.0.1 is in use: end what listens there, or choose another one with --port"],
    )


def test_a_host_that_is_not_this_machine_s_is_named() -> None:
    status, errors = ended(command(Path("models"), free_port(), "--host", "192.0.2.1"))
    assert status == 1
    assert "cannot listen on 192.0.2.1" in errors[0]


def test_gpus_that_are_not_there_are_named() -> None:
    status, errors = ended(command(Path("models"), free_port(), "--device", "cuda"))
    assert (status, errors) == (1, ["--device cuda: no GPU is found here: use --device cpu"])


def test_a_front_that_does_not_run_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    status, errors = ended(command(Path("models"), free_port()), pretend(tmp_path / "envoy", "/bin/false"))
    assert (status, errors) == (1, ["the front (Envoy, /bin/false) does not start: exit status 1"])


def test_what_the_first_worker_says_is_why_the_service_does_not_start(tmp_path: Path) -> None:
    status, errors = ended(command(tmp_path / "nowhere", free_port()))
    assert status == 1
    assert "nowhere" in errors[0]
    assert errors[1] == "the first worker did not start: what it says is above"


def test_a_folder_with_too_long_a_path_for_sockets_is_named(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    status, errors = ended(command(Path("models"), free_port()), {"TMPDIR": str(long)})
    assert status == 1
    assert "set TMPDIR to a short path" in errors[0]
