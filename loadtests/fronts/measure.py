"""What is measured of each front: closed loops, and, to check the queueing model, an open one.

The arms are the fronts, all before the same model and the same number of workers; the first is one process without a
front, which has all cores. Every block has fresh processes, unless each front is started once.
"""

import http.client
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np

from loadtests.experiment.model import Arm, Experiment, Load, Plan
from loadtests.experiment.schedule import Costs
from loadtests.experiment.server import Server, ServerError
from loadtests.fronts.serving import CLASSIFY, FRONT, SUPERVISOR, WORKER, Processes
from loadtests.generator.readers import Payload
from loadtests.limit.measure import closed_name
from service.host import available_cores, process_tree_bytes

CHECKED = ("one process", "Envoy")
"""Labels of the arms that get an open loop, too."""


@dataclass(frozen=True, kw_only=True)
class FrontsPlan(Plan):
    """What is measured, and for how long."""

    workers: int
    connections: tuple[int, ...]
    """Of the closed loops, ascending; the last one stands for saturation."""
    load_fraction: float
    """Rate of the open loop, as a fraction of the throughput of the last closed one."""
    budget_minutes: float
    start_once: bool = False
    """Each front was started once, not for every block."""
    skipped: tuple[tuple[str, str], ...] = ()
    """Fronts that cannot be measured here, and why."""

    def loads(self, arm: Arm) -> list[Load]:
        """What each block of the arm applies."""
        closed = [Load(name=closed_name(number), connections=number) for number in self.connections]
        opened = [Load(name=self.open_name, fraction=self.load_fraction)] if arm.label in CHECKED else []
        return [*closed, *opened]

    @property
    def open_name(self) -> str:
        """Name of the open loop."""
        return f"open loop at {self.load_fraction:.0%}"

    def estimated_seconds(self) -> float:
        """About how long it takes on a quiet machine."""
        return self.rounds * sum(Costs().block(self, len(self.loads(arm))) for arm in self.arms)


FrontsExperiment = Experiment[FrontsPlan]


class Budget:
    """Ends a measurement before the round that would exceed its minutes, judging by the longest round so far."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._minutes, self._clock = minutes, clock
        self._begin = self._last = clock()
        self._longest = 0.0

    def stop(self, _: int) -> str | None:
        """Called before each round: why no further one is begun, or None."""
        now = self._clock()
        self._longest, self._last = max(self._longest, now - self._last), now
        if self._longest and now + self._longest > self._begin + self._minutes * 60:
            return f"another round would exceed --budget {self._minutes:g} minutes; the same command measures more"
        return None


def describer(payloads: Sequence[Payload]) -> Callable[[Arm, Server, Path], dict[str, Any]]:
    """Gives the facts of a block: memory of the parts, bytes of a request and of its answer, workers and servers.

    `servers` are those of the queueing model: the cores, of which each worker has its share.
    """

    def describe(arm: Arm, server: Server, _: Path) -> dict[str, Any]:
        sent, received = _bytes_of_one(server, arm.model, payloads[0].data)
        others = float(np.mean([len(one.data) for one in payloads])) - len(payloads[0].data)
        parts = {name: part.pids for name, part in server.parts.items() if isinstance(part, Processes)}
        memory = {name: sum(map(process_tree_bytes, pids)) for name, pids in parts.items() if name != SUPERVISOR}
        workers = [value for name, value in memory.items() if name.startswith(WORKER.format(""))]
        return {
            "worker_bytes": float(np.mean(workers)),
            "front_bytes": memory.get(FRONT, 0),
            "request_bytes": sent + others,
            "response_bytes": received,
            "workers": len(workers),
            "servers": max(len(workers), available_cores()),
        }

    return describe


def _bytes_of_one(server: Server, model: str, body: bytes) -> tuple[int, int]:
    """Bytes of one request and of its answer, heads included. Raises ServerError."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    path = f"{CLASSIFY}?{urlencode({'model': model})}"
    try:
        connection.request("POST", path, body, {"Content-Type": "application/octet-stream"})
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{server.name} does not answer: {error!r}\n{server.log_tail()}") from error
    finally:
        connection.close()
    if answer.status != http.client.OK:
        raise ServerError(f"{server.name} answers {answer.status}: {content[:500]!r}")
    # "name: value" and the end of the line; about as much for the request as http.client writes.
    head = sum(len(name) + len(value) + 4 for name, value in answer.getheaders()) + len("HTTP/1.1 200 OK") + 4
    return len(body) + len(path) + 120, len(content) + head
