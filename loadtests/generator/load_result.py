"""What a server did under one load.

Failed and unsent requests stay among the latencies, as infinite ones: a server that answers its errors quickly does not
look fast by them.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Mode = Literal["open", "closed"]
"""An open loop sends at scheduled moments, a closed one when an answer is there."""
Protocol = Literal["v1", "v2"]
"""Image files to `/v1/classify`, or binary tensors to `/v2/models/NAME/infer`."""
PROTOCOLS: tuple[Protocol, ...] = ("v1", "v2")

ANSWER_SECONDS = 60.0
"""After which a request counts as not answered."""
IN_FLIGHT = 256
"""Requests of an open loop under way at most, in each generator; an arrival beyond them is not sent."""


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """What a server did under one load, in its measured window. Rates in images a second."""

    mode: Mode
    connections: int | None
    """Concurrent requests of a closed loop; None in an open one."""
    offered_rate: float | None
    """Arrivals per second of an open loop; None in a closed one."""
    throughput: float
    """Images answered with 200."""
    latencies_ms: npt.NDArray[np.float64] = field(repr=False)
    """Of every request that was due in the window, from the moment at which it was due; infinite where it was not
    answered with 200, or not sent."""
    errors: int
    """Sent, and not answered with 200."""
    peak_bytes: int
    """Largest memory of the server's process tree; 0 where it is not known."""
    server_cores: float
    """CPU time by wall time."""
    generator_cores: float
    arrivals: int = 0
    """In an open loop: all requests due in the window, including those sent late or not at all."""
    late_arrivals: int = 0
    unsent_arrivals: int = 0
    device_bytes: int | None = None
    """Largest memory on the GPU; None where there is none."""
    stages_ms: dict[str, float] = field(default_factory=dict)
    """The server's own mean times of an image, by stage: decode, queue, inference, total."""
    labelled: int = 0
    """Answers for images whose class is known."""
    correct: int = 0
    """Of them those whose first class was the right one."""
    percentiles_ms: dict[str, float | None] = field(default_factory=dict)
    """`p50_ms`, `p95_ms`, `p99_ms` of a result that was read back from results.json, which keeps no latencies."""

    @property
    def answered(self) -> int:
        """Requests that were due in the window and answered with 200."""
        return int(np.isfinite(self.latencies_ms).sum())
