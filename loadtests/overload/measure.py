"""A step overload: what happens to deadlines, and to accuracy, when more arrives than a model can answer.

Each arm is the name of a model or of a family, all served by the same service with the same models. Arrivals are an
open loop whose rate steps up and down again; every request has the same deadline.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
    p99_ms: float
    """99th percentile of the answers with 200; not a number where fewer than five lie beyond it."""
    mean_top1: float
    """Accuracy of the models that answered within the deadline, averaged over the answers; not a number if unknown."""
    models: dict[str, float]
    """The fraction of these answers that each model gave."""


class Requests:
    """The requests of some whole blocks, as arrays in the same order."""

    def __init__(self, blocks: Sequence[Block], deadline_ms: float) -> None:
        loads = [block.loads[STEPS] for block in blocks]
        traces = [load.trace for load in loads if load.trace]
        self.due_s = np.concatenate([trace.due_s for trace in traces])
        self.statuses = np.concatenate([trace.statuses for trace in traces])
        self.models = np.concatenate([trace.models for trace in traces])
        self.latencies_ms = np.concatenate([load.latencies_ms for load in loads])
        self.blocks = np.repeat(np.arange(len(blocks)), [len(load.latencies_ms) for load in loads])
        self.good = (self.statuses == 200) & (self.latencies_ms <= deadline_ms)
        """Answered with 200 within the deadline, counted from the moment at which each was due."""


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
    every = Requests(blocks, plan.deadline_ms)
    within = (every.due_s >= begin) & (every.due_s < begin + seconds)
    statuses, good, due = every.statuses[within], every.good[within], int(within.sum())
    late = ((statuses == 200) & ~good) | (statuses == 504)
    refused = statuses == 429
    rates = np.bincount(every.blocks[within][good], minlength=len(blocks)) / seconds
    served = Counter(every.models[within][good].tolist())
    answers, top1 = served.total(), blocks[0].info["top1"]
    p99_ms = percentile(every.latencies_ms[within][statuses == 200], 99)

    def fraction(requests: npt.NDArray[np.bool_]) -> float:
        return float(requests.mean()) if due else 0.0

    return StepResult(
        arm=blocks[0].arm,
        rate=rate,
        offered_rate=due / (seconds * len(blocks)),
        goodput=float(rates.mean()),
        goodput_range=(float(rates.min()), float(rates.max())),
        within_deadline=fraction(good),
        refused=fraction(refused),
        too_late=fraction(late),
        failed=fraction(~(good | late | refused)),
        p99_ms=math.nan if p99_ms is None else p99_ms,
        mean_top1=sum(top1.get(model, math.nan) * n / answers for model, n in served.items()) if answers else math.nan,
        models={model: n / answers for model, n in served.most_common()},
    )
