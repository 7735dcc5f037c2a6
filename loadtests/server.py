"""A server process of its own for each measurement, and the peak of its memory."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil

_START_SECONDS = 120
_STOP_SECONDS = 20
_SAMPLE_SECONDS = 0.05
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The services are on this machine: a proxy of the environment has no business in between."""


class ServerError(Exception):
    """A server did not start, or died; the message holds the end of its log."""


class Server:
    """A running server: its address and its memory."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], *, name: str, log: Path) -> None:
        self.url, self.name, self.log = url, name, log
        self.pid = process.pid
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

    def last_words(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

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


def running_server(
    repository: Path, model: str | None, *, log: Path, arguments: Sequence[str] = ()
) -> AbstractContextManager[Server]:
    """Serve one model of `repository`, or all, in a fresh process until the block ends. Raises ServerError."""
    service = [sys.executable, "-m", "service", "--repository", str(repository)]
    if model is not None:
        service += ["--models", model]
    return running(
        lambda port: [*service, "--port", str(port), "--log-level", "warning", *arguments],
        name=f"the service for {model or 'all models'}",
        log=log,
    )


@contextmanager
def running(command: Callable[[int], list[str]], *, name: str, log: Path) -> Iterator[Server]:
    """Run `command(port)`, wait until /readyz says yes, and end it with the block. Raises ServerError."""
    port = free_port()
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603 (our own command)
            command(port),
            stdout=stream,
            stderr=stream,
            # ONNX Runtime's wheels report usage to their maker unless told not to; the service sees to it itself.
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        )
        server = Server(f"http://127.0.0.1:{port}", process, name=name, log=log)
        try:
            _wait_until_ready(server)
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


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if not server.alive():
            raise ServerError(f"{server.name} did not start:\n{server.last_words()}")
        try:
            with _DIRECT.open(server.url + "/readyz", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise ServerError(f"{server.name} was not ready after {_START_SECONDS} s:\n{server.last_words()}")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
