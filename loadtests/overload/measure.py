"""A step overload: what happens to deadlines, and to accuracy, when more arrives than a model can answer.

Each arm is the name of a model or of a family, all served by the same service with the same models. Arrivals are an
open loop whose rate steps up and down again; every request has the same deadline.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtests.experiment.model import Arm, Block, Experiment, Load, Plan
from loadtests.experiment.server import Server
from loadtests.generator.load_result import RequestTrace
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
    """Of the answers with 200; not a number where fewer than five lie beyond it."""
    mean_top1: float
    """Accuracy of the models that answered within the deadline, averaged over the answers; not a number if unknown."""
    models: dict[str, float]
    """The fraction of these answers that each model gave."""


@dataclass(frozen=True)
class Requests:
    """The requests of a whole block."""

    trace: RequestTrace
    latencies_ms: npt.NDArray[np.float64]
    good: npt.NDArray[np.bool_]
    """Answered with 200 within the deadline, counted from the moment at which each was due."""

    @classmethod
    def of(cls, block: Block, deadline_ms: float) -> "Requests":
        """Raises ValueError for a load without a trace."""
        load = block.loads[STEPS]
        if load.trace is None:
            raise ValueError("a stepped load has a trace")
        return cls(load.trace, load.latencies_ms, (load.trace.statuses == 200) & (load.latencies_ms <= deadline_ms))


def top1_of_models(_arm: Arm, server: Server, _repository: Path) -> dict[str, Any]:
    """Top-1 of every model that is served, from its manifest: on its test split, not on these requests."""
    return {"top1": {model["name"]: model["accuracy"]["top1"] for model in server.models() if model.get("accuracy")}}


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
    due = refused = late = 0
    served: Counter[str] = Counter()
    rates: list[float] = []
    answered: list[npt.NDArray[np.float64]] = []
    for block in blocks:
        requests = Requests.of(block, plan.deadline_ms)
        within = (requests.trace.due_s >= begin) & (requests.trace.due_s < begin + seconds)
        statuses, good = requests.trace.statuses[within], requests.good[within]
        due += len(statuses)
        refused += int((statuses == 429).sum())
        late += int((((statuses == 200) & ~good) | (statuses == 504)).sum())
        served.update(requests.trace.models[within][good].tolist())
        rates.append(int(good.sum()) / seconds)
        answered.append(requests.latencies_ms[within][statuses == 200])
    count, whole = served.total(), seconds * len(blocks)
    top1: dict[str, float] = blocks[0].info["top1"]
    p99_ms = percentile(np.concatenate(answered), 99)
    return StepResult(
        arm=blocks[0].arm,
        rate=rate,
        offered_rate=due / whole,
        goodput=count / whole,
        goodput_range=(min(rates), max(rates)),
        within_deadline=count / due if due else 0.0,
        refused=refused / due if due else 0.0,
        too_late=late / due if due else 0.0,
        failed=(due - count - late - refused) / due if due else 0.0,
        p99_ms=math.nan if p99_ms is None else p99_ms,
        mean_top1=sum(top1.get(model, math.nan) * n / count for model, n in served.items()) if count else math.nan,
        models={model: n / count for model, n in served.most_common()},
    )
