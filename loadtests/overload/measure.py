"""A step overload: what becomes of deadlines, and of accuracy, when more arrives than a model can answer.

Each target is a model's name or a family's, all served by the same service with the same models, a fresh process for
each block. Arrivals are an open loop whose rate steps up and down again; each request has the same deadline.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from loadtests.experiment.json_files import to_json
from loadtests.experiment.locust_runner import RequestSpec, shaped_loop
from loadtests.experiment.server import running_server
from loadtests.generator import payload_cache
from loadtests.generator.payloads import read_payloads
from loadtests.generator.samples import LATE_MS, UNSENT
from loadtests.statistics import percentile

Steps = list[tuple[float, float]]

_USERS_AT_LEAST = 20
"""Sources of the lowest step: rates are made of whole ones."""
_CHANGE_SECONDS = 1.5
"""Of each step that are not counted."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked of whom, and how much."""

    repository: Path
    targets: tuple[str, ...]
    data: Path | None
    steps: Steps
    """(arrivals a second, seconds)."""
    deadline_ms: float
    rounds: int
    service_arguments: tuple[str, ...] = ()

    def order(self) -> list[tuple[int, str]]:
        """(round, target) of each block, in the order in which they run: A B, B A, ..."""
        return [
            (number, target)
            for number in range(self.rounds)
            for target in (self.targets if number % 2 == 0 else self.targets[::-1])
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of one request."""

    at: float
    """Seconds after the begin at which it was due."""
    latency_ms: float
    status: int
    model: str


@dataclass(frozen=True, kw_only=True)
class Block:
    """All requests of one target in one round."""

    target: str
    round: int
    answers: list[Answer] = field(repr=False)
    top1: dict[str, float]
    """Of each model, from its manifest: on the test split, not on these requests."""
    unsent_arrivals: int
    late_arrivals: int
    generator_cores: float
    server_cores: float


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One step of one target, over all rounds."""

    target: str
    rate: float
    offered_rate: float
    """Requests a second that were due."""
    goodput: float
    """Answered with 200 within the deadline, a second."""
    goodput_range: tuple[float, float]
    """Of the rounds."""
    within_deadline: float
    """The same, as a part of all that were due."""
    refused: float
    """With 429, as a part of all."""
    too_late: float
    """Answered after the deadline or given up (504), as a part of all."""
    failed: float
    """Anything else, not sent for want of connections included."""
    p99_ms: float
    """Of the answers with 200; not a number where fewer than five lie beyond it."""
    mean_top1: float
    """Of the models that gave the answers within the deadline."""
    models: dict[str, float]
    """Which part of them each gave."""


def overload(plan: Plan, out: Path, blocks: list[Block], *, on_block: Callable[[str, int, int], None]) -> None:
    """Fill `blocks`. Server logs are kept in `out`. Raises PayloadError or ServerError."""
    out.mkdir(parents=True, exist_ok=True)
    order = plan.order()
    with tempfile.TemporaryDirectory(prefix="stridevit-load-") as folder:
        payload_cache.save(read_payloads(plan.data), Path(folder))
        for done, (number, target) in enumerate(order):
            on_block(target, done, len(order))
            blocks.append(_measure(plan, target, number, Path(folder), out / f"server-{number}-{target}.log"))


def _measure(plan: Plan, target: str, number: int, payloads: Path, log: Path) -> Block:
    seconds = sum(length for _, length in plan.steps)
    with running_server(plan.repository, None, log=log, arguments=plan.service_arguments) as server:
        samples, meter = shaped_loop(
            server,
            RequestSpec(payloads=payloads, model=target, deadline_ms=plan.deadline_ms),
            rates=",".join(f"{rate:g}:{length:g}" for rate, length in plan.steps),
            rate_per_user=min(rate for rate, _ in plan.steps) / _USERS_AT_LEAST,
            seconds=seconds,
            seed=number,
        )
        models = server.models()
    begin = min(sample.due_s for sample in samples)
    server_cores, generator_cores = meter.cores(begin, seconds)
    return Block(
        target=target,
        round=number,
        answers=[
            Answer(
                at=sample.due_s - begin,
                latency_ms=sample.latency_ms,
                status=sample.status,
                model=sample.model.rpartition("/")[0],
            )
            for sample in samples
        ],
        top1={name: info["accuracy"]["top1"] for name, info in models.items() if info.get("accuracy")},
        unsent_arrivals=sum(sample.status == UNSENT for sample in samples),
        late_arrivals=sum(sample.behind_ms > LATE_MS for sample in samples),
        generator_cores=generator_cores,
        server_cores=server_cores,
    )


def results(plan: Plan, blocks: list[Block]) -> list[StepResult]:
    """The steps of every target, pooled over the rounds."""
    return [
        _step(plan, [block for block in blocks if block.target == target], place)
        for target in plan.targets
        for place in range(len(plan.steps))
    ]


def _step(plan: Plan, blocks: list[Block], place: int) -> StepResult:
    rate, length = plan.steps[place]
    # Locust changes the number of its users once a second: what is sent meanwhile is of neither step.
    changing = min(_CHANGE_SECONDS, length / 2)
    begin, seconds = sum(earlier for _, earlier in plan.steps[:place]) + changing, length - changing
    by_round = [[a for a in block.answers if begin <= a.at < begin + seconds] for block in blocks]
    answers = [answer for answers in by_round for answer in answers]
    whole = seconds * len(blocks)
    due = len(answers)
    good = [answer for answer in answers if is_good(answer, plan.deadline_ms)]
    late = sum((a.status == 200 and not is_good(a, plan.deadline_ms)) or a.status == 504 for a in answers)
    refused = sum(answer.status == 429 for answer in answers)
    served = Counter(answer.model for answer in good)
    rates = [sum(is_good(a, plan.deadline_ms) for a in answers) / seconds for answers in by_round]
    latencies = [answer.latency_ms for answer in answers if answer.status == 200]
    top1 = blocks[0].top1
    return StepResult(
        target=blocks[0].target,
        rate=rate,
        offered_rate=due / whole,
        goodput=len(good) / whole,
        goodput_range=(min(rates), max(rates)),
        within_deadline=len(good) / due if due else 0.0,
        refused=refused / due if due else 0.0,
        too_late=late / due if due else 0.0,
        failed=(due - len(good) - late - refused) / due if due else 0.0,
        p99_ms=math.nan if (p99_ms := percentile(latencies, 99)) is None else p99_ms,
        # Not a number without a good answer, or where one of the models does not know how accurate it is.
        mean_top1=sum(top1.get(model, math.nan) * count / len(good) for model, count in served.items())
        if good
        else math.nan,
        models={model: count / len(good) for model, count in served.most_common()},
    )


def is_good(answer: Answer, deadline_ms: float) -> bool:
    """Whether a request was answered within its deadline, counted from the moment at which it was due."""
    return answer.status == 200 and answer.latency_ms <= deadline_ms


def markdown(found: list[StepResult]) -> str:
    """A table, a row a step and target."""
    columns = ("asked for", "arrivals/s", "in time/s (rounds)", "in time", "refused", "too late", "failed", "p99 ms")
    lines = [
        f"| {' | '.join(columns)} | mean top-1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for step in found:
        low, high = step.goodput_range
        parts = (step.within_deadline, step.refused, step.too_late, step.failed)
        lines.append(
            f"| `{step.target}` | {step.offered_rate:.0f} | {step.goodput:.0f} ({low:.0f}–{high:.0f}) | "
            + " | ".join(f"{part:.1%}" for part in parts)
            + f" | {_known(step.p99_ms, '.0f')} | {_known(step.mean_top1, '.2%')} |"
        )
    return "\n".join(lines) + "\n"


def _known(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def as_json(plan: Plan, blocks: list[Block], found: list[StepResult], about: dict[str, Any]) -> dict[str, Any]:
    """All but the single answers."""
    return {
        "about": about,
        "plan": to_json(plan),
        "steps": [asdict(step) for step in found],
        "blocks": [
            {key: value for key, value in asdict(block).items() if key != "answers"} | {"answers": len(block.answers)}
            for block in blocks
        ],
    }


def plot(plan: Plan, blocks: list[Block], path: Path) -> None:
    """Arrivals and answers in time by second, and the mean top-1 of the models that gave them; the first round."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    seconds = int(sum(length for _, length in plan.steps))
    edges = np.arange(seconds + 1)
    for target in plan.targets:
        block = next(block for block in blocks if block.target == target)
        good = [answer for answer in block.answers if is_good(answer, plan.deadline_ms)]
        counts, _ = np.histogram([answer.at for answer in good], bins=edges)
        weights = [block.top1.get(answer.model, math.nan) * 100 for answer in good]
        sums, _ = np.histogram([answer.at for answer in good], bins=edges, weights=weights)
        above.plot(edges[:-1] + 0.5, counts, label=f"{target}: in time")
        below.plot(
            edges[:-1] + 0.5, np.divide(sums, counts, where=counts > 0, out=np.full(seconds, np.nan)), label=target
        )
    due, _ = np.histogram([answer.at for answer in blocks[0].answers], bins=edges)
    above.plot(edges[:-1] + 0.5, due, color="grey", linestyle=":", label="arrivals")
    above.set_ylabel("requests a second")
    above.set_ylim(bottom=0)
    above.legend()
    below.set_ylabel("mean top-1, %")
    below.set_xlabel("seconds")
    below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path)
