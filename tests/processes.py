"""A service in a process of its own, asked over a real socket."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from loadtests.experiment.server import free_port

ROOT = Path(__file__).parents[1]
in_a_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout of this project")


@contextmanager
def serving(
    repository: Path, *, python: str = sys.executable, environment: dict[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve `repository` until the block ends; gives the base URL and the process."""
    port = free_port()
    process = subprocess.Popen(
        [python, "-m", "service", "--repository", str(repository), "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            if process.poll() is not None:
                assert process.stderr
                raise AssertionError(f"the service ended with {process.returncode}:\n{process.stderr.read()}")
            try:
                if httpx.get(url + "/readyz", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                assert time.monotonic() < deadline, "the service was not ready within a minute"
                time.sleep(0.1)
        yield url, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        process.communicate()
