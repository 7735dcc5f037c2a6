"""A step overload: what happens to deadlines, and to accuracy, when more arrives than a model can answer.

Each arm is the name of a model or of a family, all served by the same service with the same models. Arrivals are an
open loop whose rate steps up and down again; every request has the same deadline.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.experiment.model import Arm, Block, Experiment, Load, Plan
from loadtests.experiment.server import Server
from loadtests.statistics import percentile

STEPS = "steps"
"""Name of the only load."""
_CHANGE_SECONDS = 1.5
"""Dropped at the start of each step: Locust changes the number of its users once per second."""


@dataclass(frozen=True, kw_only=True)
class OverloadPlan(Plan):
    """What is measured; `seconds` are those of all steps together."""

    steps: tuple[tuple[float, float], ...]
    """(arrivals per second, seconds)."""
    deadline_ms: float

    def loads(self, _: Arm) -> list[Load]:
        """What each block applies."""
        return [Load(name=STEPS, steps=self.steps)]


OverloadExperiment = Experiment[OverloadPlan]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One step of one arm, over all rounds. Outcomes are fractions of the requests that were due."""

    arm: str
    rate: float
    """Arrivals per second that were asked for."""
    offered_rate: float
    """Requests per second that were due."""
    goodput: float
    """Requests per second that were answered with 200 within the deadline."""
    goodput_range: tuple[float, float]
    """The smallest and the largest round."""
    within_deadline: float
    refused: float
    """Answered with 429."""
    too_late: float
    """Answered after the deadline, or dropped because of it (504)."""
    failed: float
    """Everything else, including requests not sent for want of connections."""
    p99_ms: float | None
    """99th percentile of the answers with 200; None where fewer than five lie beyond it."""
    mean_top1: float | None
    """Accuracy of the models that answered within the deadline, averaged over the answers; None if unknown."""
    models: dict[str, float]
    """The fraction of these answers that each model gave."""


def requests(blocks: Sequence[Block], deadline_ms: float) -> Any:
    """One record per request of some whole blocks: due_s, latency_ms, outcome, model, and the number of its block.

    Latency and deadline count from the moment at which it was due.
    """
    loads = [block.loads[STEPS] for block in blocks]
    traces = [load.trace for load in loads if load.trace]
    statuses = np.concatenate([trace.statuses for trace in traces])
    latencies_ms = np.concatenate([load.latencies_ms for load in loads])
    answered = statuses == 200
    ends = [answered & (latencies_ms <= deadline_ms), answered | (statuses == 504), statuses == 429]
    columns = {
        "due_s": np.concatenate([trace.due_s for trace in traces]),
        "latency_ms": latencies_ms,
        "outcome": np.select(ends, ["in time", "too late", "refused"], "failed"),
        "model": np.concatenate([trace.models for trace in traces]),
        "block": np.repeat(np.arange(len(blocks)), [len(load.latencies_ms) for load in loads]),
    }
    return np.rec.fromarrays(columns.values(), dtype=[(name, column.dtype) for name, column in columns.items()])


def top1_of_models(_arm: Arm, server: Server, _repository: Path) -> dict[str, Any]:
    """Top-1 of every model that is served, from its manifest: on its test split, not on these requests."""
    models = server.ask("/v1/models")["models"]
    return {"top1": {model["name"]: model["accuracy"]["top1"] for model in models if model.get("accuracy")}}


def step_results(experiment: OverloadExperiment) -> list[StepResult]:
    """The steps of every arm that has a whole block, pooled over the rounds."""
    return [
        _step(experiment.plan, blocks, place)
        for arm in experiment.plan.arms
        if (blocks := experiment.blocks_of(arm.label))
        for place in range(len(experiment.plan.steps))
    ]


def _step(plan: OverloadPlan, blocks: list[Block], place: int) -> StepResult:
    rate, length = plan.steps[place]
    changing = min(_CHANGE_SECONDS, length / 2)
    begin, seconds = sum(earlier for _, earlier in plan.steps[:place]) + changing, length - changing
    every = requests(blocks, plan.deadline_ms)
    due = every[(every.due_s >= begin) & (every.due_s < begin + seconds)]
    good = due[due.outcome == "in time"]
    goodput = np.bincount(good.block, minlength=len(blocks)) / seconds
    fractions = {outcome: count / len(due) for outcome, count in Counter(due.outcome.tolist()).items()}
    models = {model: count / len(good) for model, count in Counter(good.model.tolist()).most_common()}
    top1 = blocks[0].info["top1"]
    known = bool(models) and models.keys() <= top1.keys()
    return StepResult(
        arm=blocks[0].arm,
        rate=rate,
        offered_rate=len(due) / (seconds * len(blocks)),
        goodput=float(goodput.mean()),
        goodput_range=(float(goodput.min()), float(goodput.max())),
        within_deadline=fractions.get("in time", 0.0),
        refused=fractions.get("refused", 0.0),
        too_late=fractions.get("too late", 0.0),
        failed=fractions.get("failed", 0.0),
        p99_ms=percentile(due.latency_ms[np.isfinite(due.latency_ms)], 99),
        mean_top1=sum(top1[model] * fraction for model, fraction in models.items()) if known else None,
        models=models,
    )
