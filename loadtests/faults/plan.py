"""Which faults are tried, how long, and under which load; and what was found."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtests.experiment.json_files import from_json
from loadtests.experiment.model import Experiment, Plan
from loadtests.faults.client import Outcome

CUT = "cut"
"""Sent wholly to a process that then ended at once: such a request cannot be answered."""
DEADLINE_MS = 8000.0
ANSWER_SECONDS = DEADLINE_MS / 1000 + 7
"""A request without an answer after its deadline and this much more counts as lost."""


@dataclass(frozen=True, kw_only=True)
class FaultPlan(Plan):
    """Arms are faults; `seconds` is how long the load runs before and after each, and how long a lasting one lasts."""

    rounds: int = 1
    rate: float
    """Requests a second."""
    deadline_ms: float | None = DEADLINE_MS
    not_run: tuple[tuple[str, str], ...] = ()
    """Faults that cannot be done on this machine, and why."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Latencies of the answered requests that were due before, during or after a fault, in milliseconds."""

    requests: int
    answered: int
    p50_ms: float | None
    p99_ms: float | None
    """None for fewer than a hundred."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """The requests that were due in one part of the time."""

    at_s: float
    """Its beginning, in seconds after the fault began."""
    answered: int
    refused: int
    others: int
    worst_ms: float | None
    """Of the answered requests."""


@dataclass(frozen=True, kw_only=True)
class FaultResult:
    """What became of a service under one fault."""

    fault: str
    what: str
    survives: bool
    """Whether the process had to survive."""
    spares_others: bool = False
    """Whether no request of the load may fail."""
    not_run: str | None = None
    """Why the fault could not be done after all."""
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*Outcome, CUT), 0))
    """Requests by outcome, and those that were `CUT`."""
    statuses: dict[str, int] = field(default_factory=dict)
    """Failed requests by HTTP status."""
    before: Moments | None = None
    during: Moments | None = None
    after: Moments | None = None
    lasted_s: float = 0.0
    first_answer_s: float | None = None
    """After a restart: from the end of the process to the first request that was due later and answered."""
    recovery_s: float | None = None
    """From the end of the fault; None if it did not recover."""
    exit_codes: tuple[int, ...] = ()
    """Exit codes of the processes that ended under the load."""
    peak_bytes: int = 0
    late_arrivals: int = 0
    notes: tuple[str, ...] = ()
    unmet: tuple[str, ...] = ()
    timeline: tuple[Bin, ...] = ()

    @property
    def sent(self) -> int:
        """All requests that were due."""
        return sum(self.counts.values())

    @property
    def broken(self) -> list[str]:
        """What is not as promised, in words."""
        found = list(self.unmet)
        if swapped := self.counts.get("swapped"):
            found.append(f"{swapped} answers to another image")
        if self.survives and (lost := self.counts.get("lost")):
            found.append(f"{lost} requests lost")
        if self.spares_others and (failed := self.counts.get("failed")):
            found.append(f"{failed} innocent requests failed")
        if self.survives and self.exit_codes:
            found.append(f"the process ended with {', '.join(map(str, self.exit_codes))}")
        return found


@dataclass(kw_only=True)
class FaultExperiment(Experiment[FaultPlan]):
    """A block for each fault."""

    @property
    def results(self) -> list[FaultResult]:
        """Results of the faults that were tried, in order."""
        return [result_in(block.info) for block in self.blocks if "result" in block.info]

    @property
    def broken(self) -> Sequence[str]:
        """What is not as promised, over all faults."""
        return [f"{result.fault}: {text}" for result in self.results for text in result.broken]


def result_in(info: dict[str, Any]) -> FaultResult:
    """The result that a block's info holds."""
    return from_json(info["result"], FaultResult)
