"""Processes of their own: a service on a real socket, and commands that are interrupted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from loadtests.experiment.server import free_port

ROOT = Path(__file__).parents[1]
PATIENCE_SECONDS = 400
"""How long a test waits for another process: longer than anything takes on a busy machine, shorter than its timeout."""
PATIENT_SERVICE = {
    "STRIDEVIT_DEFAULT_DEADLINE_MS": "400000",
    "STRIDEVIT_MAX_DEADLINE_MS": "400000",
    "STRIDEVIT_MIN_UPLOAD_RATE": "0",
    "STRIDEVIT_BODY_TIMEOUT_SECONDS": "400",
    "STRIDEVIT_HEAD_TIMEOUT_SECONDS": "400",
    "STRIDEVIT_HANG_MIN_SECONDS": "400",
    "STRIDEVIT_HANG_MAX_SECONDS": "400",
}
"""The environment of a service that refuses and ends nothing because a busy machine, or a client on it, is slow."""
in_a_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout of this project")


@contextmanager
def serving(
    repository: Path,
    *,
    python: str = sys.executable,
    command: Sequence[str] | None = None,
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve `repository` until the block ends, by `python -m service` or `command`: the base URL and the process."""
    port = free_port()
    process = subprocess.Popen(
        [*(command or [python, "-m", "service"]), "--repository", str(repository), "--port", str(port)],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            if process.poll() is not None:
                assert process.stderr
                raise AssertionError(f"the service ended with {process.returncode}:\n{process.stderr.read()}")
            with suppress(httpx.TransportError):
                if get(url + "/readyz").status_code == 200:
                    break
            assert time.monotonic() < deadline, f"the service was not ready within {PATIENCE_SECONDS} s"
            time.sleep(0.1)
        yield url, process
    finally:
        end(process)
        process.communicate()


def end(process: subprocess.Popen[str]) -> None:
    """Let a service end, or kill it after a minute."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def interruptible(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block; what it says on standard error is kept."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Poll other threads or processes, as long as `process` runs."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process is None or process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def still_running(family: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those of some processes that have not ended; a zombie has."""
    return [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]


def get(url: str, **more: Any) -> httpx.Response:
    """The answer of a service, however long a busy machine takes for it."""
    return httpx.get(url, trust_env=False, timeout=PATIENCE_SECONDS, **more)


def post(url: str, content: bytes | Iterator[bytes], **more: Any) -> httpx.Response:
    """The same for a POST."""
    return httpx.post(url, content=content, trust_env=False, timeout=PATIENCE_SECONDS, **more)
