"""What is read from a process throughout a run: memory, descriptors, threads, and the latency of its answers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from loadtests.experiment.server import Server
from loadtests.statistics import trend
from service.host import process_tree

_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The process tree of a server at one moment."""

    requests: int
    """Sent so far."""
    seconds: float
    """Since the first reading."""
    pss_bytes: int
    descriptors: int
    threads: int
    latency_ms: float | None
    """Median of the answers since the last reading; None without one."""
    calm: bool
    """Whether no fault was active or had just ended."""


@dataclass(frozen=True, kw_only=True)
class Trend:
    """How a quantity changes over time: per hour, with its 95 % interval."""

    name: str
    first: float
    """Median of the first tenth of the calm readings."""
    last: float
    per_hour: float | None
    """None for too few readings."""
    low: float | None
    high: float | None


class Watch:
    """Readings of one server."""

    def __init__(self, server: Server) -> None:
        self.readings: list[dict[str, Any]] = []
        self._server, self._began = server, time.monotonic()
        self._latencies: list[float] = []

    def answered(self, latency_ms: float) -> None:
        """Count an answer."""
        self._latencies.append(latency_ms)

    def read(self, requests: int, *, calm: bool = True) -> None:
        """Take a reading."""
        descriptors = threads = 0
        for process in process_tree(self._server.pid or -1):
            try:
                descriptors, threads = descriptors + process.num_fds(), threads + process.num_threads()
            except psutil.Error:
                continue
        latencies, self._latencies = self._latencies, []
        reading = Reading(
            requests=requests,
            seconds=time.monotonic() - self._began,
            pss_bytes=self._server.memory_bytes(),
            descriptors=descriptors,
            threads=threads,
            latency_ms=float(np.median(latencies)) if latencies else None,
            calm=calm,
        )
        self.readings.append(vars(reading))


QUANTITIES = {
    "memory (PSS), MB": ("pss_bytes", 1e-6),
    "descriptors": ("descriptors", 1.0),
    "threads": ("threads", 1.0),
    "median latency, ms": ("latency_ms", 1.0),
}
"""Names in the report, and the field and the factor of each."""


def trends(readings: Sequence[dict[str, Any]]) -> list[Trend]:
    """Trends of all quantities, over the calm readings, without the first tenth of the time, in which caches fill."""
    whole = readings[-1]["seconds"]
    return [_trend(name, field, factor, readings, whole) for name, (field, factor) in QUANTITIES.items()]


def _trend(name: str, field: str, factor: float, readings: Sequence[dict[str, Any]], whole: float) -> Trend:
    calm = [reading for reading in readings if reading["calm"] and reading[field] is not None and reading["requests"]]
    settled = [reading for reading in calm if reading["seconds"] >= whole / 10]
    values = [reading[field] * factor for reading in calm]
    tenth = max(1, len(values) // 10)
    hours = [reading["seconds"] / _HOUR for reading in settled]
    slope = trend(hours, [reading[field] * factor for reading in settled])
    estimate, low, high = slope.at(0.95) if slope else (None, None, None)
    return Trend(
        name=name,
        first=float(np.median(values[:tenth])) if values else 0.0,
        last=float(np.median(values[-tenth:])) if values else 0.0,
        per_hour=estimate,
        low=low,
        high=high,
    )
