"""What LoadGen is to do: plain data for both processes, LoadGen's own and the one that starts it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Scenario = Literal["SingleStream", "Offline", "Server"]
SCENARIOS: tuple[Scenario, ...] = ("SingleStream", "Offline", "Server")
"""In the order in which they run: the Server scenario's rate is a fraction of what Offline has reached."""

_FULL_SECONDS = 600.0
"""MLPerf's minimum duration of a scenario, for the estimate; LoadGen itself knows it."""
_OFFLINE_LONGER = 1.5
"""LoadGen's one query is made larger than the rate requires."""
_START_STOP_SECONDS = 8.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which scenarios run, and for how long."""

    model: str
    """Name of a model or a family."""
    repository: Path
    url: str | None
    """A service that already runs; without one, a service is started for each scenario."""
    data: Path | None
    scenarios: tuple[Scenario, ...]
    accuracy: bool
    """LoadGen's AccuracyOnly mode, which sends each image once, instead of PerformanceOnly."""
    full: bool
    """MLPerf's own minimum durations and query counts."""
    seconds: float
    """Minimum duration of a scenario that is not full."""
    target_qps: float | None
    """Rate of the Server scenario; None for `load`."""
    load: float
    """The Server scenario's rate as a fraction of Offline's samples per second, else of the warm-up's."""
    latency_ms: float | None
    """Bound of the Server scenario's 99th percentile; None for MLPerf's own."""
    connections: int
    """In Offline and Server; SingleStream has one."""
    service_arguments: tuple[str, ...]

    @property
    def mode(self) -> str:
        """LoadGen's name of the mode."""
        return "AccuracyOnly" if self.accuracy else "PerformanceOnly"

    @property
    def warmup_seconds(self) -> float:
        """Before LoadGen starts; the warm-up also measures the rate that LoadGen wants to know."""
        return 15.0 if self.full else 3.0

    def estimated_seconds(self, scenario: Scenario) -> float:
        """About how long a scenario takes, including its server's start."""
        shortest = 0.0 if self.accuracy else _FULL_SECONDS if self.full else self.seconds
        return _START_STOP_SECONDS + self.warmup_seconds + shortest * (_OFFLINE_LONGER if scenario == "Offline" else 1)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One scenario: the command line of LoadGen's process, as JSON."""

    plan: Plan
    scenario: Scenario
    url: str
    """Address of the service's route, with the query."""
    images: Path
    """Folder of image files."""
    out: Path
    """Folder for LoadGen's logs and `sut.json`."""
    target_qps: float | None = None
    """Rate of the Server scenario; None for `Plan.load` × the rate of the warm-up."""

    @property
    def connections(self) -> int:
        """SingleStream sends one image after the other."""
        return 1 if self.scenario == "SingleStream" else self.plan.connections
