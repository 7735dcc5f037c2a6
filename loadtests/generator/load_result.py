"""What a server did under one load.

Failed and unsent requests stay among the latencies, as infinite ones: a server that answers its errors quickly does not
look fast because of them.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from loadtests.generator.samples import LATE_MS, UNSENT, Samples

Mode = Literal["open", "closed"]
"""An open loop sends at scheduled moments, a closed one as soon as the last answer has arrived."""
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
    ended_ms: npt.NDArray[np.float64] = field(repr=False)
    """Milliseconds from the scheduled moment to the end of the answer, whatever its status."""
    behind_ms: npt.NDArray[np.float64] = field(repr=False)
    """Delay between the scheduled moment and sending."""


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """What a server did under one load, within its measured window."""

    throughput: float
    """Images answered with 200, per second."""
    latencies_ms: npt.NDArray[np.float64] = field(repr=False)
    """Of every request that was due in the window, counted from the moment at which it was due; infinite if it was not
    answered with 200, or not sent."""
    errors: int
    """Requests sent, but not answered with 200."""
    late_arrivals: int = 0
    """Sent more than `LATE_MS` after they were due."""
    unsent_arrivals: int = 0
    labelled: int = 0
    """Answers for images whose class is known."""
    correct: int = 0
    """Those of them whose first class was the right one."""
    mode: Mode
    connections: int | None
    """Concurrent requests of a closed loop; None in an open one."""
    offered_rate: float | None = None
    """Arrivals per second of an open loop; None in a closed one, or where it changes."""
    peak_bytes: int = 0
    """Largest memory of the server's process tree; 0 if unknown."""
    server_cores: float = 0.0
    """CPU time divided by wall time; 0 if unknown."""
    generator_cores: float = 0.0
    part_cores: dict[str, float] = field(default_factory=dict)
    """The same for the server's parts (`Server.parts`)."""
    counts: dict[str, float] = field(default_factory=dict)
    """What the server counted for its parts (`Server.counts`) from the load's beginning to its end."""
    arrivals: int = 0
    """In an open loop: all requests due in the window, including those sent late or not at all."""
    device_bytes: int | None = None
    """Largest memory on the GPU; None without one."""
    stages_ms: dict[str, float] = field(default_factory=dict)
    """Mean times per image by the server's own clocks: decode, queue, inference, total, ..."""
    percentiles_ms: dict[str, float | None] = field(default_factory=dict)
    """`p50_ms`, `p95_ms`, `p99_ms` of a result that was read back from results.json, which keeps no latencies."""
    trace: RequestTrace | None = None
    """Only where individual requests matter."""

    @property
    def answered(self) -> int:
        """Requests that were due in the window and answered with 200."""
        return int(np.isfinite(self.latencies_ms).sum())


def window(
    samples: Samples, *, begin: float, seconds: float, connections: int | None, traced: bool = False, **others: Any
) -> LoadResult:
    """The `seconds` after `begin`, a Unix time; `others` are the fields that do not follow from samples.

    Throughput counts the answers that *ended* in the window; latencies are of the requests that were *due* in it,
    whenever they ended. Requiring both would leave out the slowest, most of all those of a slow server.
    """
    end, ended_s = begin + seconds, samples.due_s + samples.latency_ms / 1000
    due = samples[(begin <= samples.due_s) & (samples.due_s < end)]
    ok, sent = due.status == 200, due.status != UNSENT
    models = np.array([model.rpartition("/")[0] for model in due.model], dtype=np.str_)
    return LoadResult(
        throughput=float(((samples.status == 200) & (begin < ended_s) & (ended_s <= end)).sum() / seconds),
        latencies_ms=np.where(ok, due.latency_ms, np.inf),
        errors=int((sent & ~ok).sum()),
        late_arrivals=int((sent & (due.behind_ms > LATE_MS)).sum()),
        unsent_arrivals=int((~sent).sum()),
        labelled=int(np.isfinite(due.correct).sum()),
        correct=int(np.nansum(due.correct)),
        mode="open" if connections is None else "closed",
        connections=connections,
        arrivals=len(due) if connections is None else 0,
        trace=_trace(due, begin, models) if traced else None,
        **others,
    )


def _trace(due: Samples, begin: float, models: npt.NDArray[np.str_]) -> RequestTrace:
    return RequestTrace(
        due_s=due.due_s - begin,
        statuses=due.status,
        models=models,
        ended_ms=due.latency_ms,
        behind_ms=due.behind_ms,
    )
