"""A server process of its own for each measurement, or somebody's at a URL; and what memory it takes."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

from loadtests.errors import LoadTestError
from loadtests.experiment.http_get import get, get_json
from service.host import process_tree, process_tree_bytes

_START_SECONDS = 120
_STOP_SECONDS = 20
"""The services are on this machine: a proxy of the environment has no business in between."""


class ServerError(LoadTestError):
    """A server did not start, or died; the message holds the end of its log."""


class Server:
    """A server that answers: in a process of ours, or anybody's at a URL."""

    def __init__(self, url: str, *, name: str, process: subprocess.Popen[bytes] | None = None, log: Path | None = None):
        self.url, self.name, self.log = url, name, log
        self.pid = process.pid if process else None
        self._process = process

    def model(self, name: str) -> dict[str, Any]:
        """What the service says of a model, and of its newest version's manifest. Raises ServerError."""
        try:
            models = {model["name"]: model for model in self._get("/v1/models")["models"]}
            detail = self._get(f"/v1/models/{quote(name)}")
        except (OSError, ValueError, LookupError) as error:
            raise ServerError(f"{self.name} does not say what {name!r} is: {error}") from error
        return {**models.get(name, {}), "source": detail["manifest"].get("source"), "batch_ms": detail.get("batch_ms")}

    def models(self) -> dict[str, dict[str, Any]]:
        """What the service says of its models, by name."""
        return {model["name"]: model for model in self._get("/v1/models")["models"]}

    def alive(self) -> bool:
        """Whether the process still runs; of somebody else's, nobody knows."""
        return self._process is None or self._process.poll() is None

    def memory_bytes(self) -> int:
        """Of its process tree now; 0 where that is not known."""
        return process_tree_bytes(self.pid) if self.pid is not None else 0

    def log_tail(self, lines: int = 15) -> str:
        """The end of its log."""
        if self.log is None:
            return ""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _get(self, path: str) -> Any:
        return get_json(self.url + path, timeout=10)


def running_server(
    repository: Path,
    model: str | None,
    *,
    log: Path,
    arguments: Sequence[str] = (),
    source: Path | None = None,
) -> AbstractContextManager[Server]:
    """Serve one model of `repository`, or all, in a fresh process until the block ends. Raises ServerError.

    `source` is a checkout of this project, whose service is run instead of the one at hand.
    """
    service = [sys.executable, "-m", "service", "--repository", str(repository.resolve())]
    if model is not None:
        service += ["--models", model]
    return running(
        lambda port: [*service, "--port", str(port), "--log-level", "warning", *arguments],
        name=f"the service for {model or 'all models'}",
        log=log,
        source=source,
    )


@contextmanager
def running(
    command: Callable[[int], list[str]], *, name: str, log: Path, source: Path | None = None
) -> Iterator[Server]:
    """Run `command(port)`, wait until /readyz says yes, and end it with the block. Raises ServerError."""
    port = free_port()
    # ONNX Runtime's wheels report usage to their maker unless told not to; the service sees to it itself.
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603 (our own command)
            command(port), stdout=stream, stderr=stream, env=environment, cwd=source
        )
        server = Server(f"http://127.0.0.1:{port}", name=name, process=process, log=log)
        try:
            _wait_until_ready(server)
            yield server
        finally:
            end(process)


def end(process: subprocess.Popen[Any]) -> None:
    """Stop a process and those that it started."""
    family = process_tree(process.pid)
    for member in family:
        with suppress(psutil.Error):
            member.terminate()
    for member in psutil.wait_procs(family, timeout=_STOP_SECONDS)[1]:
        with suppress(psutil.Error):
            member.kill()
    process.wait()


def remote_server(url: str) -> Server:
    """A server that runs already, and is ready. Raises ServerError."""
    server = Server(url.rstrip("/"), name=f"the server at {url}")
    try:
        get(server.url + "/readyz", timeout=10)
    except (urllib.error.URLError, OSError) as error:
        raise ServerError(f"{server.name} is not ready ({server.url}/readyz: {error})") from error
    return server


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if not server.alive():
            raise ServerError(f"{server.name} did not start:\n{server.log_tail()}")
        try:
            get(server.url + "/readyz", timeout=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise ServerError(f"{server.name} was not ready after {_START_SECONDS} s:\n{server.log_tail()}")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
