"""What a comparison consists of: arms, loads, blocks; and how a block is kept on disk until all are there.

A *round* holds one *block* of every arm, each in a fresh server process; a block puts its server under several *loads*
one after the other. Failed and unsent requests stay among the latencies, as infinite ones: a server that answers its
errors quickly does not look fast by them.
"""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Protocol = Literal["v1", "v2"]
"""Image files to `/v1/classify`, or binary tensors to `/v2/models/NAME/infer`."""
PROTOCOLS: tuple[Protocol, ...] = ("v1", "v2")

IN_FLIGHT = 256
"""Requests of an open loop under way at most, in each generator; an arrival beyond them is not sent."""

SATURATED = "saturated"
"""The closed loop: as many users as keep the server busy."""
MODERATE = "moderate"
"""An open loop at a rate that every arm masters with ease."""
HIGH = "high"
"""An open loop at a rate that comes close to what the slowest arm can do."""
LOADS = (SATURATED, MODERATE, HIGH)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things that are compared."""

    label: str
    """Unique in a comparison; as the user wrote it."""
    model: str
    settings: tuple[tuple[str, str], ...] = ()
    """Settings of the service for this arm alone."""
    url: str | None = None
    """Of a server that runs already; then memory and CPU are not known."""
    commit: str | None = None
    """The service of this commit, instead of the one at hand."""
    twin_of: str | None = None
    """Label of the arm that this one repeats, to see what the machine's noise alone makes of it (A/A)."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a server did under one load, in its measured window. Rates in images a second."""

    connections: int | None
    """Of a closed loop; None in an open one."""
    offered: float | None
    """Arrivals a second of an open loop."""
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
    """Of an open loop, the warm-up's among them, as are those that were sent late, or not at all."""
    late: int = 0
    unsent: int = 0
    device_bytes: int | None = None
    """Largest memory on the GPU; None where there is none."""
    stages_ms: dict[str, float] = field(default_factory=dict)
    """The server's own mean times of an image, by stage: decode, queue, inference, total."""
    labelled: int = 0
    """Answers for images whose class is known."""
    correct: int = 0
    """Of them those whose first class was the right one."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One arm in one round."""

    arm: str
    """Its label."""
    round: int
    idle_bytes: int = 0
    """Of the fresh process; 0 where it is not known, as in `after_bytes`."""
    after_bytes: int = 0
    """When all loads were over."""
    loads: dict[str, Load] = field(default_factory=dict)
    """By the names in `LOADS`."""
    info: dict[str, Any] = field(default_factory=dict, repr=False)
    """What the service says of the model: variant, tokens, kv_tokens, params, precision, accuracy, sha256, ..."""
    failure: str | None = None
    """Why it could not be measured to its end; then its loads do not count."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """The largest rate of arrivals at which an arm keeps its objective, by bisection."""

    arm: str
    round: int
    rate: float | None
    """Images a second; 0 if not even the lowest rate that was tried kept it; None if it could not be found."""
    probes: tuple[tuple[float, float | None], ...]
    """(rate, latency in ms at the objective's percentile, None where it was infinite or not reached)."""
    why_not: str | None = None
    """Why there is no rate."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared, and how long."""

    repository: Path
    arms: tuple[Arm, ...]
    """The first is the baseline. An arm with `twin_of` is the A/A arm."""
    data: Path | None
    protocol: Protocol
    users: int
    seconds: float
    """Measured seconds of each load."""
    warmup_seconds: float
    """Dropped at the start of each load."""
    rounds: int
    default_rounds: int
    """A run with fewer rounds says so."""
    shares: tuple[float, float]
    """Of the slowest arm's saturated throughput: the rates of the moderate and the high open loop."""
    objective_ms: float
    objective_percentile: float
    searches: int
    """Rounds of the bisection; 0 for none."""
    budget_minutes: float
    service_arguments: tuple[str, ...]
    seed: int


@dataclass(kw_only=True)
class Comparison:
    """All that was measured, and where."""

    plan: Plan
    command: str
    environment: dict[str, str]
    payloads: str = ""
    rates: dict[str, float] = field(default_factory=dict)
    """Arrivals a second of the open loops: of `MODERATE` and `HIGH`."""
    blocks: list[Block] = field(default_factory=list)
    searches: list[Search] = field(default_factory=list)
    ended_early: str | None = None
    finished: datetime | None = None

    def of(self, label: str) -> list[Block]:
        """The blocks of one arm that were measured to their end, by round."""
        return sorted(
            (block for block in self.blocks if block.arm == label and block.failure is None),
            key=lambda block: block.round,
        )
