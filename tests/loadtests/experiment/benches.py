"""A bench whose servers and loads are made up."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.experiment.model import Arm, ComparisonPlan, Experiment, Load, Plan
from loadtests.experiment.run import Bench
from loadtests.experiment.server import Server
from loadtests.generator.load_result import LoadResult
from loadtests.generator.readers import Payload

PAYLOADS = [Payload("one.png", b"1", 1), Payload("two.png", b"2", 2)]


def plan(*labels: str, **changes: Any) -> Plan:
    arms = tuple(Arm(label=label, model=label) for label in labels)
    return Plan(
        **{"repository": Path("no-such-repository"), "arms": arms, "data": None, "rounds": 2, "seconds": 1.0, **changes}
    )


def comparison_plan(*arms: Arm, **changes: Any) -> ComparisonPlan:
    values: dict[str, Any] = {
        "repository": Path("no-such-repository"),
        "arms": arms,
        "data": None,
        "connections": 16,
        "seconds": 0.0,
        "rounds": 10,
        "default_rounds": 10,
        "load_fractions": (0.3, 0.7),
        "objective_ms": 0.0,
        "objective_percentile": 99.0,
        "capacity_searches": 1,
        "budget_minutes": 30.0,
    }
    return ComparisonPlan(**(values | changes))


@dataclass
class Notes:
    """Progress that is remembered."""

    steps: list[tuple[str, float, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def step(self, what: str, done: float, total: float) -> None:
        self.steps.append((what, done, total))

    def note(self, message: str) -> None:
        self.notes.append(message)


def result(load: Load, throughput: float, latency_ms: float = 10.0) -> LoadResult:
    return LoadResult(
        mode="open" if load.connections is None else "closed",
        connections=load.connections,
        offered_rate=load.rate,
        throughput=throughput,
        latencies_ms=np.full(1000, latency_ms),
        errors=0,
        peak_bytes=2,
        server_cores=1.0,
        generator_cores=0.1,
    )


class MadeUpServer(Server):
    def memory_bytes(self) -> int:
        return 1


class FakeBench(Bench):
    """Remembers what is started and applied, in order; `answers(arm, load)` is what a load finds."""

    def __init__(self, experiment: Experiment[Any], out: Path, answers: Callable[[Arm, Load], LoadResult]) -> None:
        super().__init__(experiment, PAYLOADS, out, describe=lambda *_: {"kv_tokens": 3})
        self._answers = answers
        self.started: list[str] = []
        self.loads: list[tuple[str, Load]] = []
        self.before_start: Callable[[Arm], None] = lambda _: None

    def _server(self, arm: Arm, log: Path) -> AbstractContextManager[Server]:
        return self._start(arm, log)

    @contextmanager
    def _start(self, arm: Arm, log: Path) -> Iterator[Server]:
        self.before_start(arm)
        self.started.append(log.stem)
        yield MadeUpServer("http://nowhere", name=arm.label)

    def apply(self, arm: Arm, server: Server, load: Load, *, seconds: float, seed: int) -> LoadResult:
        self.loads.append((arm.label, load))
        return self._answers(arm, load)
