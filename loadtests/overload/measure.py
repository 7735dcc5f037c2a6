"""More arrives than a model can answer: what happens to deadlines, refusals, accuracy and memory, and how it recovers.

Each arm is the name of a model or of a family, all served by the same service with the same models. Arrivals are an
open loop whose rate steps up and down again; every request has the same deadline. The steps' rates are given, or they
are multiples (*levels*) of the throughput that a closed loop has just reached in the same block, followed by a *rest*.

What a level can reach at best (`ceiling`) follows from CPU time: a server that spends `a` on an answer and `r` on a
refusal, and has C cores, gives at most g answers per second of n arrivals, where g·a + (n - g)·r = C. `a` is measured
in the closed loop; `r` on bare uvicorn, which decides nothing (loadtests/baseline/refusing.py).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtests.experiment.model import SATURATED, Arm, Block, Experiment, Load, Plan
from loadtests.experiment.server import Server
from loadtests.generator.samples import LATE_MS, UNSENT
from loadtests.report.rendering import median
from loadtests.statistics import percentile

STEPS = "steps"
"""Name of the load whose steps have given rates."""
CONNECTIONS = ("kept", "new")
"""Names of the loads whose steps are levels: on kept-alive connections, or with one connection per request."""
SATURATING_CONNECTIONS = 8
"""Of the closed loop: enough to keep every core busy, and so few that no answer misses its deadline."""

_CHANGE_SECONDS = 1.5
"""Dropped at the start of each step, while what was accepted in the step before is answered."""
_IN_FLIGHT = 2000
"""Most requests in flight: so many wait in a server that answers neither in time nor with a refusal."""
_REST_LEVEL, _REST_SECONDS = 0.5, 10.0
_RECOVERED, _RECOVERY_BIN_SECONDS = 2.0, 0.5
"""A service has recovered once the median latency of every later half second is at most this many times the first
level's, and nothing is refused or fails."""
_SENT = 0.95
"""A level counts as sent if this fraction of its rate was due, and this fraction of that was sent in time."""


@dataclass(frozen=True, kw_only=True)
class OverloadPlan(Plan):
    """What is measured; `seconds` are those of all steps together, or of each level."""

    steps: tuple[tuple[float, float], ...] = ()
    """(arrivals per second, seconds)."""
    levels: tuple[float, ...] = ()
    """Arrivals as multiples of the saturated throughput, instead of `steps`."""
    connections: tuple[str, ...] = ()
    """Some of `CONNECTIONS`, for levels."""
    deadline_ms: float
    bursts: int = 0
    """Bursts before the levels, to see what the service predicts; see `estimates`."""

    def loads(self, arm: Arm) -> list[Load]:
        """What each block applies."""
        if not self.levels:
            return [Load(name=STEPS, steps=self.steps, in_flight=_IN_FLIGHT)]
        saturated = Load(name=SATURATED, connections=SATURATING_CONNECTIONS)
        reuse = {name: name == "kept" for name in self.connections}
        if arm.kind == "refusing":
            return [
                Load(name=name, connections=SATURATING_CONNECTIONS, reuse_connections=reuse[name])
                for name in self.connections
            ]
        steps = (*((level, self.seconds) for level in self.levels), (_REST_LEVEL, _REST_SECONDS))
        return [
            saturated,
            *(
                Load(name=name, steps=steps, relative_steps=True, reuse_connections=reuse[name], in_flight=_IN_FLIGHT)
                for name in self.connections
            ),
        ]

    def rates(self, block: Block) -> tuple[tuple[float, float], ...]:
        """(arrivals per second, seconds) of every step of a block, without the rest."""
        if not self.levels:
            return self.steps
        saturated = block.loads[SATURATED].throughput
        return tuple((level * saturated, self.seconds) for level in self.levels)


OverloadExperiment = Experiment[OverloadPlan]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One step of one arm, over all rounds. Outcomes are fractions of the requests that were due."""

    arm: str
    load: str
    level: float | None
    """Arrivals as a multiple of the saturated throughput; None if the rate was given."""
    rate: float
    """Arrivals per second as planned."""
    offered_rate: float
    """Requests per second that were due."""
    sent: bool
    """Whether the generator could send them in time; if not, the step says little about the service."""
    goodput: float
    """Requests per second that were answered with 200 within the deadline."""
    goodput_range: tuple[float, float]
    """The smallest and the largest round."""
    of_peak: float | None
    """The goodput as a fraction of the largest of the arm's steps under the same load; None if nothing was in time."""
    of_ceiling: float | None
    """The goodput as a fraction of what the CPU allows (see the module); None if that is unknown."""
    within_deadline: float
    refused: float
    """Answered with 429."""
    too_late: float
    """Answered after the deadline, or dropped because of it (504)."""
    failed: float
    """Everything else, including requests not sent for want of connections."""
    refused_p50_ms: float | None
    """Median time from the scheduled moment to the end of a refusal, by the client's clock."""
    p99_ms: float | None
    """99th percentile of the answers with 200; None where fewer than five lie beyond it."""
    mean_top1: float | None
    """Accuracy of the models that answered within the deadline, averaged over the answers; None if unknown."""
    models: dict[str, float]
    """The fraction of these answers that each model gave."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What follows the last level of one arm under one load: the median of the rounds, and their largest memory."""

    arm: str
    load: str
    seconds: float | None
    """From the end of the last level until latency is normal again; None if it never was in a round."""
    idle_mb: float
    peak_mb: float


def requests(blocks: Sequence[Block], load: str, deadline_ms: float) -> Any:
    """One record per request of some whole blocks: due_s, ended_ms, behind_ms, status, outcome, model, number of block.

    Latency and deadline count from the moment at which it was due.
    """
    traces = [block.loads[load].trace for block in blocks]
    found = [trace for trace in traces if trace]
    statuses, ended_ms = (
        np.concatenate([getattr(trace, name) for trace in found]) for name in ("statuses", "ended_ms")
    )
    answered = statuses == 200
    ends = [answered & (ended_ms <= deadline_ms), answered | (statuses == 504), statuses == 429]
    columns = {
        "due_s": np.concatenate([trace.due_s for trace in found]),
        "ended_ms": ended_ms,
        "behind_ms": np.concatenate([trace.behind_ms for trace in found]),
        "status": statuses,
        "outcome": np.select(ends, ["in time", "too late", "refused"], "failed"),
        "model": np.concatenate([trace.models for trace in found]),
        "block": np.repeat(np.arange(len(found)), [len(trace.due_s) for trace in found]),
    }
    return np.rec.fromarrays(columns.values(), dtype=[(name, column.dtype) for name, column in columns.items()])


def top1_of_models(server: Server) -> dict[str, Any]:
    """Top-1 of every model that is served, from its manifest: on its test split, not on these requests."""
    models = server.ask("/v1/models")["models"]
    return {"top1": {model["name"]: model["accuracy"]["top1"] for model in models if model.get("accuracy")}}


def step_results(experiment: OverloadExperiment) -> list[StepResult]:
    """The steps of every arm that has a whole block, pooled over the rounds."""
    plan = experiment.plan
    found: list[StepResult] = []
    for blocks in measured_arms(experiment):
        for load in plan.connections or (STEPS,):
            every = requests(blocks, load, plan.deadline_ms)
            parts = [_due(plan, blocks, every, place) for place in range(len(plan.rates(blocks[0])))]
            goods = [float((part.outcome == "in time").sum() / seconds / len(blocks)) for part, seconds in parts]
            ceilings = _ceilings(experiment, blocks, load)
            found += [
                _step(plan, blocks, load, place, part, seconds, peak=max(goods), ceiling=ceilings[place])
                for place, (part, seconds) in enumerate(parts)
            ]
    return found


def measured_arms(experiment: OverloadExperiment) -> list[list[Block]]:
    """The blocks of each arm that has a whole one, without the server that only refuses."""
    served = (arm for arm in experiment.plan.arms if arm.kind != "refusing")
    return [blocks for arm in served if (blocks := experiment.blocks_of(arm.label))]


def _due(plan: OverloadPlan, blocks: list[Block], every: Any, place: int) -> tuple[Any, float]:
    """The requests of one step without its beginning, and its remaining seconds."""
    steps = plan.rates(blocks[0])
    length = steps[place][1]
    changing = min(_CHANGE_SECONDS, length / 2)
    begin = sum(earlier for _, earlier in steps[:place]) + changing
    return every[(every.due_s >= begin) & (every.due_s < begin + length - changing)], length - changing


def _step(
    plan: OverloadPlan,
    blocks: list[Block],
    load: str,
    place: int,
    due: Any,
    seconds: float,
    *,
    peak: float,
    ceiling: float | None,
) -> StepResult:
    rate = float(np.mean([plan.rates(block)[place][0] for block in blocks]))
    offered = len(due) / (seconds * len(blocks))
    good, refused = due[due.outcome == "in time"], due[due.outcome == "refused"]
    in_time = (due.status != UNSENT) & (due.behind_ms <= LATE_MS)
    goodput = np.bincount(good.block, minlength=len(blocks)) / seconds
    fractions = {outcome: count / len(due) for outcome, count in Counter(due.outcome.tolist()).items()}
    models = {model: count / len(good) for model, count in Counter(good.model.tolist()).most_common()}
    top1 = blocks[0].info["top1"]
    known = bool(models) and models.keys() <= top1.keys()
    return StepResult(
        arm=blocks[0].arm,
        load=load,
        level=plan.levels[place] if plan.levels else None,
        rate=rate,
        offered_rate=offered,
        sent=offered >= _SENT * rate and bool(len(due)) and float(in_time.mean()) >= _SENT,
        goodput=float(goodput.mean()),
        goodput_range=(float(goodput.min()), float(goodput.max())),
        of_peak=float(goodput.mean()) / peak if peak else None,
        of_ceiling=float(goodput.mean()) / min(ceiling, offered) if ceiling and offered else None,
        within_deadline=fractions.get("in time", 0.0),
        refused=fractions.get("refused", 0.0),
        too_late=fractions.get("too late", 0.0),
        failed=fractions.get("failed", 0.0),
        refused_p50_ms=median(refused.ended_ms),
        p99_ms=percentile(due.ended_ms[due.status == 200], 99),
        mean_top1=sum(top1[model] * fraction for model, fraction in models.items()) if known else None,
        models=models,
    )


def _ceilings(experiment: OverloadExperiment, blocks: list[Block], load: str) -> list[float | None]:
    """What each step could reach at best, in answers per second."""
    plan = experiment.plan
    bare = [
        block.loads[load] for arm in plan.arms if arm.kind == "refusing" for block in experiment.blocks_of(arm.label)
    ]
    if not bare or not plan.levels:
        return [None] * len(plan.rates(blocks[0]))
    refusal = float(np.median([one.server_cores * plan.seconds / one.errors for one in bare if one.errors]))
    full = [block.loads[SATURATED] for block in blocks]
    answer = float(np.median([one.server_cores / one.throughput for one in full]))
    capacity = float(np.mean([one.throughput for one in full]))
    # The cores that the closed loop has shown to be usable; a few per cent of a core are idle even there.
    cores = capacity * answer
    rates = np.mean([[rate for rate, _ in plan.rates(block)] for block in blocks], axis=0)
    return [min(capacity, max(0.0, cores - rate * refusal) / (answer - refusal)) for rate in rates.tolist()]


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """What the service predicted before the loads, against what happened; medians over the rounds."""

    arm: str
    refusals: int
    retry_after_error: float | None
    """Relative error of the time until a retry; None without refusals."""
    predicted_finish: float | None
    """Predicted divided by actual time of accepted requests; None without any."""


def foretold(experiment: OverloadExperiment) -> list[Foretold]:
    """By arm, where it was measured (see `estimates`)."""
    found: list[Foretold] = []
    for blocks in measured_arms(experiment):
        if measured := [block.info for block in blocks if "predicted_finish" in block.info]:
            found.append(
                Foretold(
                    arm=blocks[0].arm,
                    refusals=sum(info["refusals"] for info in measured),
                    retry_after_error=median(info["retry_after_error"] for info in measured),
                    predicted_finish=median(info["predicted_finish"] for info in measured),
                )
            )
    return found


def recoveries(experiment: OverloadExperiment) -> list[Recovery]:
    """How every arm recovers from its last level, by load."""
    plan = experiment.plan
    found: list[Recovery] = []
    for blocks in measured_arms(experiment):
        for load in plan.connections:
            seconds = [_recovery(plan, block, load) for block in blocks]
            known = [one for one in seconds if one is not None]
            found.append(
                Recovery(
                    arm=blocks[0].arm,
                    load=load,
                    seconds=median(known) if len(known) == len(seconds) else None,
                    idle_mb=max(block.idle_bytes for block in blocks) / 1e6,
                    peak_mb=max(block.loads[load].peak_bytes for block in blocks) / 1e6,
                )
            )
    return found


def _recovery(plan: OverloadPlan, block: Block, load: str) -> float | None:
    every = requests([block], load, plan.deadline_ms)
    normal, _ = _due(plan, [block], every, 0)
    answered = normal.ended_ms[normal.status == 200]
    if not len(answered):
        return None
    limit = _RECOVERED * float(np.median(answered))
    end = sum(seconds for _, seconds in plan.rates(block))
    rest = every[every.due_s >= end]
    bins = np.floor((rest.due_s - end) / _RECOVERY_BIN_SECONDS).astype(int)
    bad = {number for number in set(bins.tolist()) if not _is_normal(rest[bins == number], limit)}
    last = max(bad, default=-1)
    return None if last == bins.max(initial=-1) else (last + 1) * _RECOVERY_BIN_SECONDS


def _is_normal(part: Any, limit_ms: float) -> bool:
    ok: npt.NDArray[np.bool_] = part.status == 200
    return bool(ok.all()) and float(np.median(part.ended_ms)) <= limit_ms
