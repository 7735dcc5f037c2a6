"""A service process of its own for each measurement, and the peak of its memory."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

_START_SECONDS = 120
_STOP_SECONDS = 20
_SAMPLE_SECONDS = 0.05
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The services are on this machine: a proxy of the environment has no business in between."""


class ServerError(Exception):
    """The service did not start, or died; the message holds the end of its log."""


class Server:
    """A running service: its address and its memory."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self.idle_bytes = 0
        self.peak_bytes = 0
        self._process = process
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="memory", daemon=True)

    def models(self) -> dict[str, dict[str, Any]]:
        """What the service says of its models, by name."""
        return {model["name"]: model for model in self._get("/v1/models")["models"]}

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def watch_memory(self) -> None:
        """Begin to follow the peak; what is in use now counts as idle."""
        self.idle_bytes = self.peak_bytes = tree_bytes(self._process.pid)
        self._sampler.start()

    def stop_watching(self) -> None:
        """Stop following the peak."""
        self._stop.set()
        if self._sampler.is_alive():
            self._sampler.join()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, tree_bytes(self._process.pid))

    def _get(self, path: str) -> Any:
        with _DIRECT.open(self.url + path, timeout=10) as response:
            return json.load(response)


@contextmanager
def running_server(repository: Path, model: str, *, log: Path) -> Iterator[Server]:
    """Serve one model of `repository` in a fresh process until the block ends. Raises ServerError."""
    port = free_port()
    command = [sys.executable, "-m", "service", "--repository", str(repository), "--models", model]
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603 (our own command)
            [*command, "--port", str(port), "--log-level", "warning"], stdout=stream, stderr=stream
        )
        server = Server(f"http://127.0.0.1:{port}", process)
        try:
            _wait_until_ready(server, model, log)
            yield server
        finally:
            server.stop_watching()
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def tree_bytes(pid: int) -> int:
    """Memory of a process and its children: PSS where the system tells it, else the memory unique to each."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            memory = process.memory_full_info()
            total += getattr(memory, "pss", 0) or memory.uss
    except psutil.Error:
        return total
    return total


def _wait_until_ready(server: Server, model: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if not server.alive():
            raise ServerError(f"the service for {model} did not start:\n{_tail(log)}")
        try:
            with _DIRECT.open(server.url + "/readyz", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise ServerError(f"the service for {model} was not ready after {_START_SECONDS} s:\n{_tail(log)}")


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
