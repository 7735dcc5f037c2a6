"""What an experiment consists of, for every command: a plan of arms and rounds, loads, and blocks of results.

A *round* holds one *block* of every arm, each in a fresh server process; a block applies several *loads* to its server,
one after the other. Arms are interleaved within a round, and rounds are what repeats.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from loadtests.experiment.environment import environment, this_command
from loadtests.generator.load_result import IN_FLIGHT, LoadResult
from loadtests.generator.load_result import Protocol as ApiProtocol

SATURATED, MODERATE, HIGH = LOADS = ("saturated", "moderate", "high")
"""The loads of `compare`: a closed loop with enough connections to keep the server busy, an open loop at a rate that
every arm serves with ease, and one at a rate close to the slowest arm's capacity."""

ArmKind = Literal["service", "plain", "refusing", "engine"]
"""The service; the plain FastAPI server, or the server that refuses everything (both in loadtests/baseline); or the
engine limit, which serves no HTTP."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the candidates that are measured against each other."""

    label: str
    """Unique in an experiment; as the user wrote it."""
    model: str
    kind: ArmKind = "service"
    settings: tuple[tuple[str, str], ...] = ()
    """Settings of the service for this arm alone."""
    url: str | None = None
    """A server that already runs; its memory and CPU are unknown."""
    commit: str | None = None
    """Serve with the service, and the models, of this commit."""
    repeat_of: str | None = None
    """Label of the arm that this one repeats, to show what the machine's noise alone looks like (A/A)."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """A load that a block applies: a closed loop (`connections`), or an open one (one of the other fields)."""

    name: str
    connections: int | None = None
    rate: float | None = None
    """Arrivals per second."""
    fraction: float | None = None
    """Arrivals as a fraction of the throughput of the block's last closed loop."""
    steps: tuple[tuple[float, float], ...] = ()
    """(arrivals per second, seconds), one after the other; without a warm-up, and with `LoadResult.trace`."""
    relative_steps: bool = False
    """The rates of `steps` are multiples of the throughput of the block's last closed loop."""
    reuse_connections: bool = True
    """Without it, every request opens a connection of its own."""
    in_flight: int = IN_FLIGHT
    """Largest number of requests in flight in an open loop."""
    traced: bool = False
    """Keep `LoadResult.trace`."""

    def at(self, saturated: float) -> "Load":
        """With absolute rates in place of those relative to the saturated throughput."""
        if self.relative_steps:
            return replace(self, steps=tuple((rate * saturated, seconds) for rate, seconds in self.steps))
        return self if self.fraction is None else replace(self, rate=self.fraction * saturated)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One arm in one round."""

    arm: str
    """Its label."""
    round: int
    idle_bytes: int = 0
    """Memory of the fresh process; 0 if unknown, like `after_bytes`."""
    after_bytes: int = 0
    """Memory after all loads."""
    loads: dict[str, LoadResult] = field(default_factory=dict)
    """Results by the names of the loads."""
    info: dict[str, Any] = field(default_factory=dict, repr=False)
    """Facts about the model (see `experiment.arms.describe`); for a block without loads, what it measured."""
    failure: str | None = None
    """Why the block was not measured to its end; then its loads do not count."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and for how long."""

    repository: Path
    arms: tuple[Arm, ...]
    """The first is the baseline. An arm with `repeat_of` is the A/A arm."""
    data: Path | None
    rounds: int
    seconds: float
    """Measured seconds of each load."""
    warmup_seconds: float = 0.0
    """Dropped at the start of each load."""
    service_arguments: tuple[str, ...] = ()
    protocol: ApiProtocol = "v1"
    deadline_ms: float | None = None
    """Sent with every request; None for the service's default."""
    seed: int = 0
    server_cores: tuple[int, ...] = ()
    """The only cores that servers may use; empty for all, like `generator_cores`."""
    generator_cores: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan(Plan):
    """The plan of `compare`."""

    connections: int
    """Concurrent requests of the closed loop."""
    default_rounds: int
    """A run with fewer rounds says so."""
    load_fractions: tuple[float, float]
    """Rates of the moderate and the high open loop, as fractions of the slowest arm's saturated throughput."""
    objective_ms: float
    objective_percentile: float
    capacity_searches: int
    """Searches per arm; 0 for none."""
    budget_minutes: float


P = TypeVar("P", bound=Plan)


class Progress(Protocol):
    """Where a measurement reports its progress."""

    def step(self, what: str, done: float, total: float) -> None:
        """`what` begins now; `done` of `total` steps or seconds have passed."""

    def note(self, message: str) -> None:
        """Show a line that stays on the screen."""


@dataclass(kw_only=True)
class Measurement:
    """What the results of every command hold besides their figures."""

    command: str = field(default_factory=this_command)
    environment: dict[str, str] = field(default_factory=environment)
    payloads: str = ""
    """What was sent, in words."""
    ended_early: str | None = None
    """Why the measurement did not finish; the report then holds what was measured until then."""
    finished: datetime | None = None

    @property
    def measured(self) -> bool:
        """Whether there is anything to report yet."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """The beginning of every results.json."""
        return {
            "command": self.command,
            "finished": self.finished.isoformat(timespec="seconds") if self.finished else None,
            "ended_early": self.ended_early,
            "environment": self.environment,
            "payloads": self.payloads,
        }


@dataclass(kw_only=True)
class Experiment(Measurement, Generic[P]):
    """Blocks in the order in which they ran."""

    plan: P
    blocks: list[Block] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        """Whether a block was tried."""
        return bool(self.blocks)

    @property
    def failures(self) -> list[Block]:
        """Blocks that were not measured to their end."""
        return [block for block in self.blocks if block.failure is not None]

    def blocks_of(self, label: str) -> list[Block]:
        """The blocks of one arm that were measured to their end, by round."""
        return sorted(
            (block for block in self.blocks if block.arm == label and block.failure is None),
            key=lambda block: block.round,
        )


@dataclass(frozen=True, kw_only=True)
class CapacitySearch:
    """The largest rate of arrivals at which an arm meets its latency objective, found by bisection."""

    arm: str
    round: int
    rate: float | None
    """Images per second; 0 if not even the lowest rate tried met it; None if it could not be found."""
    probes: tuple[tuple[float, float | None], ...]
    """(rate, latency in ms at the objective's percentile, None where it was infinite or not reached)."""
    reason: str | None = None
    """Why there is no rate."""
    failed: bool = False
    """There is no rate because the server failed."""


@dataclass(kw_only=True)
class Comparison(Experiment[ComparisonPlan]):
    """All that `compare` measured."""

    rates: dict[str, float] = field(default_factory=dict)
    """Arrivals per second of the open loops `MODERATE` and `HIGH`."""
    capacity_searches: list[CapacitySearch] = field(default_factory=list)
