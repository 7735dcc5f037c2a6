"""A fresh server process for each measurement, or a server that already runs at a URL."""

import errno
import os
import secrets
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from loadtests.errors import LoadTestError
from loadtests.experiment.commits import environment_for
from loadtests.experiment.http_get import get, get_json
from loadtests.experiment.process import start
from service.host import process_tree_bytes

_START_SECONDS = 300
_ASK_SECONDS = 60
"""For one answer outside of loads: a busy machine may stand still for a while."""
_STAGES = "stridevit_stage_duration_seconds"

StageTotals = dict[tuple[str, str], float]
"""Seconds (`sum`) and images (`count`) by stage, over all models since the server's start."""


class ServerError(LoadTestError):
    """A server died, or did not answer as it should; the message holds the end of its log."""


class ServerStartError(ServerError):
    """A server did not become ready."""


class Server:
    """A server that answers at `url`: our own process, whose id and log are known, or another one."""

    def __init__(self, url: str, *, name: str, process: subprocess.Popen[Any] | None = None, log: Path | None = None):
        self.url, self.name, self.log = url, name, log
        self.pid = process.pid if process else None
        self._process = process
        self.parts: dict[str, Callable[[], float]] = {}
        """CPU seconds that its parts have used, by name, where it has several. They raise psutil.Error or OSError."""
        self.counts: Callable[[], dict[str, float]] = dict
        """What it has counted for its parts since its start, by name. Raises OSError or ValueError."""

    def ask(self, path: str) -> Any:
        """The JSON of `GET path`. Raises OSError or ValueError."""
        return get_json(self.url + path, timeout=_ASK_SECONDS)

    def model(self, name: str) -> dict[str, Any]:
        """What the service says about a model: manifest, version, labels, latency by batch size. Raises like `ask`."""
        return dict(self.ask(f"/v1/models/{quote(name)}"))

    def metric(self, name: str) -> list[Sample]:
        """The samples of a metric; none if there is no such metric. Raises OSError or ValueError."""
        families = text_string_to_metric_families(get(self.url + "/metrics", timeout=_ASK_SECONDS).decode("utf-8"))
        return [sample for family in families if family.name == name for sample in family.samples]

    def stage_totals(self) -> StageTotals:
        """Where its time went, by the present state of its histogram of stages; empty without one."""
        try:
            samples = self.metric(_STAGES)
        except (OSError, ValueError):
            return {}
        totals: StageTotals = defaultdict(float)
        for sample in samples:
            totals[sample.labels["stage"], sample.name.removeprefix(f"{_STAGES}_")] += sample.value
        return totals

    def alive(self) -> bool:
        """Whether our process still runs; true for a server at a URL."""
        return self._process is None or self._process.poll() is None

    def memory_bytes(self) -> int:
        """Present memory of the process tree; 0 for a server at a URL."""
        return process_tree_bytes(self.pid) if self.pid is not None else 0

    def log_tail(self) -> str:
        """The last lines of its log; empty for a server at a URL."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log else []
        return "\n".join(lines[-15:])

    def died(self, when: str) -> ServerError:
        """The error to raise when it is not `alive`."""
        return ServerError(f"{self.name} died {when}:\n{self.log_tail()}\n(log: {self.log})")


def mean_stages_ms(before: StageTotals, after: StageTotals) -> dict[str, float]:
    """Mean milliseconds per image in each stage, of the images between two readings."""
    between = {name: total - before.get(name, 0.0) for name, total in after.items()}
    return {
        stage: between[stage, "sum"] / images * 1000
        for (stage, kind), images in between.items()
        if kind == "count" and images > 0
    }


@contextmanager
def service_for(
    models: str | None,
    *,
    repository: Path,
    log: Path,
    arguments: Sequence[str] = (),
    url: str | None = None,
    source: Path | None = None,
    cores: Collection[int] = (),
) -> Iterator[Server]:
    """A fresh service for some models (separated by commas), or all; or the server that already runs at `url`.

    `source` is a checkout of another commit: its service is run, with `arguments` as environment variables. `cores` as
    in `start`. Raises ServerError.
    """
    if url is not None:
        server = Server(url.rstrip("/"), name=f"the server at {url}")
        try:
            get(server.url + "/readyz", timeout=_ASK_SECONDS)
        except (OSError, ValueError) as error:
            raise ServerStartError(
                f"{server.name} is not ready ({server.url}/readyz: {error}): "
                "give the address of a running service, such as http://127.0.0.1:8000"
            ) from error
        yield server
        return
    command = [sys.executable, "-m", "service", "--repository", str(repository.resolve()), "--log-level", "warning"]
    command += [*(["--models", models] if models else []), *(arguments if source is None else ()), "--port"]
    variables = {**environment_for(arguments), "PYTHONPATH": str(source)} if source else None
    name = f"the service for {models or 'all models'}"
    with running(command, name=name, log=log, environment=variables, folder=source, cores=cores) as server:
        yield server


@contextmanager
def running(
    command: Sequence[str],
    *,
    name: str,
    log: Path,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    cores: Collection[int] = (),
) -> Iterator[Server]:
    """Run a command with a free port appended until the block ends; yields when /readyz answers. Raises ServerError."""
    port = free_port()
    # ONNX Runtime's wheels send usage data to their maker by default; the service turns that off by itself.
    variables = {**(os.environ if environment is None else environment), "ORT_DISABLE_TELEMETRY": "1"}
    with (
        log.open("wb") as stream,
        start(
            [*command, str(port)], stdout=stream, stderr=stream, environment=variables, folder=folder, cores=cores
        ) as process,
    ):
        server = Server(f"http://127.0.0.1:{port}", name=name, process=process, log=log)
        wait_until_ready(server)
        yield server


def wait_until_ready(server: Server) -> None:
    """Block until /readyz answers with 200. Raises ServerStartError."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if not server.alive():
            raise ServerStartError(f"{server.name} did not start:\n{server.log_tail()}")
        try:
            get(server.url + "/readyz", timeout=2)
            return
        except OSError:
            time.sleep(0.1)
    raise ServerStartError(f"{server.name} was not ready after {_START_SECONDS} s:\n{server.log_tail()}")


def free_port() -> int:
    """A port of this machine on which nothing listens.

    It is likely to stay free until it is used, even while a process restarts: Linux takes the ports of outgoing
    connections, and of sockets that ask for any port, from 32768 upwards.
    """
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
