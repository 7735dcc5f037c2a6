"""What a comparison consists of: arms, loads, blocks; and how a block is kept on disk until all are there.

A *round* holds one *block* of every arm, each in a fresh server process; a block puts its server under several *loads*
one after the other.
"""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from loadtests.generator.load_result import LoadResult
from loadtests.generator.load_result import Protocol as ApiProtocol

SATURATED = "saturated"
"""The closed loop: as many connections as keep the server busy."""
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
    repeat_of: str | None = None
    """Label of the arm that this one repeats, to see what the machine's noise alone makes of it (A/A)."""


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
    loads: dict[str, LoadResult] = field(default_factory=dict)
    """By the names in `LOADS`."""
    info: dict[str, Any] = field(default_factory=dict, repr=False)
    """What the service says of the model: variant, tokens, kv_tokens, params, precision, accuracy, sha256, ..."""
    failure: str | None = None
    """Why it could not be measured to its end; then its loads do not count."""


@dataclass(frozen=True, kw_only=True)
class CapacitySearch:
    """The largest rate of arrivals at which an arm keeps its objective, by bisection."""

    arm: str
    round: int
    rate: float | None
    """Images a second; 0 if not even the lowest rate that was tried kept it; None if it could not be found."""
    probes: tuple[tuple[float, float | None], ...]
    """(rate, latency in ms at the objective's percentile, None where it was infinite or not reached)."""
    reason: str | None = None
    """Why there is no rate."""
    failed: bool = False
    """Because the server failed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared, and how long."""

    repository: Path
    arms: tuple[Arm, ...]
    """The first is the baseline. An arm with `repeat_of` is the A/A arm."""
    data: Path | None
    protocol: ApiProtocol
    connections: int
    """Concurrent requests of the closed loop."""
    seconds: float
    """Measured seconds of each load."""
    warmup_seconds: float
    """Dropped at the start of each load."""
    rounds: int
    default_rounds: int
    """A run with fewer rounds says so."""
    load_fractions: tuple[float, float]
    """Rates of the moderate and the high open loop, as fractions of the slowest arm's saturated throughput."""
    objective_ms: float
    objective_percentile: float
    capacity_searches: int
    """Rounds of the bisection; 0 for none."""
    budget_minutes: float
    service_arguments: tuple[str, ...]
    seed: int


class Progress(Protocol):
    """Where a measurement reports how far it is."""

    def step(self, what: str, done: float, total: float) -> None:
        """`what` begins now; `done` of `total` steps or seconds are over."""

    def note(self, message: str) -> None:
        """A line that stays."""


@dataclass(kw_only=True)
class Measurement:
    """What the results of every command hold beside their figures."""

    command: str
    """As it can be run again."""
    environment: dict[str, str]
    payloads: str = ""
    """What was sent, in words."""
    ended_early: str | None = None
    """Why the measurement did not finish; the report then holds what was measured until then."""
    finished: datetime | None = None

    @property
    def measured(self) -> bool:
        """Whether there is anything to report yet."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Comparison(Measurement):
    """All that `compare` measured."""

    plan: Plan
    rates: dict[str, float] = field(default_factory=dict)
    """Arrivals a second of the open loops: of `MODERATE` and `HIGH`."""
    blocks: list[Block] = field(default_factory=list)
    capacity_searches: list[CapacitySearch] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        """Whether a block was measured."""
        return bool(self.blocks)

    def blocks_of(self, label: str) -> list[Block]:
        """The blocks of one arm that were measured to their end, by round."""
        return sorted(
            (block for block in self.blocks if block.arm == label and block.failure is None),
            key=lambda block: block.round,
        )
