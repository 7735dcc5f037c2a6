"""A service in its own process, on a real socket."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from loadtests.experiment.server import free_port

ROOT = Path(__file__).parents[1]
START_SECONDS = 120
"""Long enough for a busy machine."""
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
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None:
                assert process.stderr
                raise AssertionError(f"the service ended with {process.returncode}:\n{process.stderr.read()}")
            try:
                if httpx.get(url + "/readyz", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                assert time.monotonic() < deadline, f"the service was not ready within {START_SECONDS} s"
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
