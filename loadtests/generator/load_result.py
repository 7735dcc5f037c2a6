"""What a server did under one load.

Failed and unsent requests stay among the latencies, as infinite ones: a server that answers its errors quickly does not
look fast by them.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from loadtests.generator.samples import Window

Mode = Literal["open", "closed"]
"""An open loop sends at scheduled moments, a closed one as soon as the last answer has come."""
Protocol = Literal["v1", "v2"]
"""Image files to `/v1/classify`, or binary tensors to `/v2/models/NAME/infer`."""
PROTOCOLS: tuple[Protocol, ...] = ("v1", "v2")

ANSWER_SECONDS = 60.0
"""A request without an answer after this time counts as not answered."""
IN_FLIGHT = 256
"""Largest number of requests in flight in an open loop, per generator; an arrival beyond them is not sent."""


@dataclass(frozen=True, kw_only=True)
class RequestTrace:
    """Every request of a load, in the order of `LoadResult.latencies_ms`."""

    due_s: npt.NDArray[np.float64] = field(repr=False)
    """Seconds after the first request was due."""
    statuses: npt.NDArray[np.int64] = field(repr=False)
    """HTTP status; 0 without an answer, `samples.UNSENT` if it was not sent."""
    models: npt.NDArray[np.str_] = field(repr=False)
    """Name of the model that answered."""


@dataclass(frozen=True, kw_only=True)
class LoadResult(Window):
    """What a server did under one load, within its measured window."""

    mode: Mode
    connections: int | None
    """Concurrent requests of a closed loop; None in an open one."""
    offered_rate: float | None
    """Arrivals per second of an open loop; None in a closed one, or where it changes."""
    peak_bytes: int
    """Largest memory of the server's process tree; 0 if unknown."""
    server_cores: float
    """CPU time divided by wall time; 0 if unknown."""
    generator_cores: float
    arrivals: int = 0
    """In an open loop: all requests due in the window, including those sent late or not at all."""
    device_bytes: int | None = None
    """Largest memory on the GPU; None without one."""
    stages_ms: dict[str, float] = field(default_factory=dict)
    """Mean times per image by the server's own clocks: decode, queue, inference, total, ..."""
    percentiles_ms: dict[str, float | None] = field(default_factory=dict)
    """`p50_ms`, `p95_ms`, `p99_ms` of a result that was read back from results.json, which keeps no latencies."""
    trace: RequestTrace | None = None
    """Only where single requests matter."""

    @property
    def answered(self) -> int:
        """Requests that were due in the window and answered with 200."""
        return int(np.isfinite(self.latencies_ms).sum())
