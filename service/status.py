"""The state of the service in one small JSON object, for clients that poll it every second.

Its counts are the counters of /metrics. Rates and percentiles are those of the last ten seconds, as far as the status
was requested before: each answer leaves a snapshot for the later ones, and nothing is done in between.
"""

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import sub
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json

from service.gauges import predicted_drain_seconds
from service.host import resident_bytes
from service.metrics import SECONDS
from service.models.index import State
from service.models.model import Model
from service.pipeline import Pipeline
from service.rollouts.rollout import RolloutStatus

MAX_BYTES = 5000
_WINDOW_SECONDS = 10.0
_LEAST_SECONDS = 0.5
"""Shortest time between two snapshots, however many clients ask."""


class ModelStatus(BaseModel):
    """A model of the repository, all its versions together."""

    name: str
    version: int | None
    """The newest that serves."""
    state: State
    images: int
    """Answered since the start."""
    images_per_s: float
    p50_ms: float | None
    """Of requests, from arrival to answer; null if there were none in the window."""
    p95_ms: float | None
    p99_ms: float | None
    waiting: int
    """Images that wait for the engine."""
    memory_mb: float
    """Memory that loading and warm-up took."""


class QueueStatus(BaseModel):
    """Images that are accepted and not yet answered."""

    waiting: int
    limit: int


class Status(BaseModel):
    """The state of the service."""

    time: float
    """Unix time in seconds."""
    uptime_s: float
    window_s: float
    """Seconds that rates and percentiles cover: about ten, or the time since the start or the last call."""
    ready: bool
    images_per_s: float
    queue: QueueStatus
    drain_s: float | None
    """Predicted time until all accepted work is done; null while the engine hangs."""
    memory_mb: float
    lanes: int
    """Batches that may be computed at once."""
    threads: int
    """Cores for the engines."""
    device: str
    rollouts: list[RolloutStatus] = []
    """Shadows and canaries; left out if there are none."""
    refusals: dict[str, int]
    """Requests refused or ended since the start, by reason."""
    models: list[ModelStatus]
    """The busiest first."""
    models_left_out: int
    """Models for which there was no room: the status is never longer than 5,000 bytes."""
    choices: dict[str, dict[str, int]]
    """Requests for each family, by the model that was chosen; only for models that are listed."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    at: float
    images: dict[str, int] = field(default_factory=dict)
    """Answered, by model."""
    sums: dict[str, float] = field(default_factory=dict)
    """Seconds of all requests, by model."""
    seconds: dict[str, Sequence[int]] = field(default_factory=dict)
    """Requests that took at most the upper bound of each bucket, by model."""


class Report(BaseModel):
    """What a Status is written from. Several reports can be added up."""

    members: dict[str, Any]
    """Those of a Status except `models`, `models_left_out` and `choices`."""
    models: list[dict[str, Any]]
    """The members of each ModelStatus except percentiles, and `times`: how many requests of the window took at most
    each of `SECONDS`, and at the end how many there were; empty if there were none."""
    choices: dict[str, dict[str, int]]
    """Requests by model and family."""


class StatusReport:
    """Writes the status, and keeps the snapshots of the last seconds."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        device: str,
        clock: Callable[[], float] = time.monotonic,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._pipeline, self._device = pipeline, device
        self._clock, self._unix_time = clock, unix_time
        self._started = clock()
        self._latest = _Snapshot(self._started)
        self._snapshots = deque([self._latest])

    def json(self) -> bytes:
        """A Status as JSON, of at most MAX_BYTES."""
        return written(self.take())

    def take(self) -> Report:
        """The state now."""
        pipeline, now = self._pipeline, self._snapshot()
        before = min(self._snapshots, key=lambda other: (abs(now.at - other.at - _WINDOW_SECONDS), other.at))
        seconds = max(now.at - before.at, 1e-3)
        self._keep(now)
        drain = predicted_drain_seconds(pipeline)
        members: dict[str, Any] = {
            "time": round(self._unix_time(), 3),
            "uptime_s": round(now.at - self._started, 3),
            "window_s": round(seconds, 3),
            "ready": bool(pipeline.ready and pipeline.registry.ready and not pipeline.scheduler.hang),
            "images_per_s": round(sum(_difference(now.images, before.images)) / seconds, 2),
            "queue": {"waiting": pipeline.admission.images, "limit": pipeline.limits.max_pending_images},
            "drain_s": None if math.isinf(drain) else round(drain, 6),
            "memory_mb": _mb(resident_bytes()),
            "lanes": pipeline.scheduler.lanes.count,
            "threads": pipeline.scheduler.lanes.cores,
            "device": self._device,
            "refusals": {labels["reason"]: int(count) for labels, count in pipeline.metrics.totals("rejections")},
        }
        if pipeline.rollouts:
            members["rollouts"] = [rollout.status() for rollout in pipeline.rollouts.all]
        # Without validation, which would copy every row.
        return Report.model_construct(
            members=members, models=self._models(before, now, seconds), choices=self._choices()
        )

    def _snapshot(self) -> _Snapshot:
        metrics, now, last = self._pipeline.metrics, _Snapshot(self._clock()), self._latest
        for labels, count in metrics.totals("images"):
            # Others have no times, and asking for them would create a series.
            if labels["outcome"] == "ok" and count:
                name = labels["model"]
                now.images[name] = int(count)
                now.sums[name] = total = metrics.request_seconds_sum(name)
                # Reading the buckets takes ten times as long as their sum, and most models of many are idle.
                idle = last.sums.get(name) == total
                now.seconds[name] = last.seconds[name] if idle else metrics.request_buckets(name)
        self._latest = now
        return now

    def _keep(self, now: _Snapshot) -> None:
        if now.at - self._snapshots[-1].at >= _LEAST_SECONDS:
            self._snapshots.append(now)
        while len(self._snapshots) > 1 and now.at - self._snapshots[1].at > _WINDOW_SECONDS:
            self._snapshots.popleft()

    def _models(self, before: _Snapshot, now: _Snapshot, seconds: float) -> list[dict[str, Any]]:
        """A ModelStatus of each model, the busiest first."""
        registry = self._pipeline.registry
        ready: dict[str, list[Model]] = {}
        for model in registry.ready:
            ready.setdefault(model.name, []).append(model)
        rows: list[dict[str, Any]] = []
        for entry in {entry.name: entry for entry in registry.index}.values():
            name, serving = entry.name, ready.get(entry.name, [])
            old, new = before.seconds.get(name, ()), now.seconds.get(name, ())
            times = [] if new is old else list(map(sub, new, old)) if old else new
            images = now.images.get(name, 0)
            rows.append(
                {
                    "name": name,
                    "version": serving[-1].version if serving else entry.version,
                    "state": "ready" if serving and not self._pipeline.scheduler.hang else entry.state,
                    "images": images,
                    "images_per_s": round((images - before.images.get(name, 0)) / seconds, 2),
                    "times": times,
                    "waiting": sum(len(model.queue) for model in serving),
                    "memory_mb": _mb(sum(model.model_bytes + model.arena_bytes for model in serving)),
                }
            )
        return rows

    def _choices(self) -> dict[str, dict[str, int]]:
        chosen: dict[str, dict[str, int]] = {}
        for labels, count in self._pipeline.metrics.totals("choices"):
            # For each model one family, and several reasons.
            of = chosen.setdefault(labels["model"], {})
            of[labels["family"]] = of.get(labels["family"], 0) + int(count)
        return chosen


def written(report: Report) -> bytes:
    """A Status as JSON, of at most MAX_BYTES."""
    rows = sorted(report.models, key=lambda row: (-row["images_per_s"], -row["images"], row["name"]))
    room = MAX_BYTES - len(to_json(report.members))
    listed: list[dict[str, Any]] = []
    found: dict[str, Any] = {"models": listed, "models_left_out": len(rows), "choices": {}}
    room -= len(to_json(found))
    # Percentiles only of what is listed: of a thousand models, some twenty are.
    for row in map(_model_status, rows):
        choices = report.choices.get(row["name"], {})
        # Names, quotes, colons, commas and brackets.
        room -= len(to_json(row)) + 1 + sum(len(to_json({family: {row["name"]: n}})) for family, n in choices.items())
        if room < 0:
            break
        listed.append(row)
        found["models_left_out"] -= 1
        for family, count in choices.items():
            found["choices"].setdefault(family, {})[row["name"]] = count
    return to_json({**report.members, **found})


def _model_status(row: dict[str, Any]) -> dict[str, Any]:
    """A ModelStatus of a row of a Report."""
    times = row["times"]
    percentiles = {f"p{percent}_ms": _milliseconds(times, percent / 100) for percent in (50, 95, 99)}
    return {name: value for name, value in row.items() if name != "times"} | percentiles


def _difference(now: dict[str, int], before: dict[str, int]) -> Iterable[int]:
    return (count - before.get(name, 0) for name, count in now.items())


def _milliseconds(counts: Sequence[int], quantile: float) -> float | None:
    """A quantile of the times, from the cumulative counts of the buckets of /metrics.

    Interpolated between two bounds as in Prometheus (`histogram_quantile`).
    """
    if not counts or not counts[-1]:
        return None
    rank = quantile * counts[-1]
    at = bisect_left(counts, rank)
    if at >= len(SECONDS):
        return SECONDS[-1] * 1000
    low, below = (SECONDS[at - 1], counts[at - 1]) if at else (0.0, 0)
    return round(1000 * (low + (SECONDS[at] - low) * (rank - below) / (counts[at] - below)), 3)


def _mb(count: int) -> float:
    return round(count / 1e6, 1)
