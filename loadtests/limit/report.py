"""What `stridevit loadtest limit` found: the arms under each load, and ratios paired by round.

Percentiles are taken round by round, and their median is shown. Where a round holds too few answers for its 99th
percentile, the answers of all rounds are pooled instead, and the figure is marked.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtests.experiment.model import Arm
from loadtests.generator.load_result import IN_FLIGHT, LoadResult
from loadtests.generator.samples import LATE_MS
from loadtests.limit.ideal_queue import IdealQueue
from loadtests.limit.measure import LimitExperiment, closed_name
from loadtests.report import verdicts
from loadtests.report.document import conditions, write_experiment
from loadtests.report.rendering import Table, print_tables, tables
from loadtests.statistics import paired_ratio, percentile

POOLED = -1
"""The key of a figure of all rounds together."""

ByRound = dict[int, float]
"""A figure by round."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Two figures, one divided by the other (or subtracted) round by round."""

    name: str
    values: ByRound
    unit: str = "×"

    @property
    def median(self) -> float:
        """The median over rounds."""
        return float(np.median(list(self.values.values())))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's t interval (95 %) of the mean ratio over rounds; None for fewer than five rounds."""
        values = list(self.values.values())
        effect = paired_ratio(values, [1.0] * len(values)) if self.unit == "×" and POOLED not in self.values else None
        return effect.at(0.95)[1:] if effect else None


def figures(experiment: LimitExperiment, arm: Arm, load: str) -> dict[str, ByRound]:
    """The columns of an arm under a load, by round; empty ones if no block has it."""
    blocks = {block.round: block for block in experiment.blocks_of(arm.label) if load in block.loads}
    loads = {number: block.loads[load] for number, block in blocks.items()}
    samples = {number: load.latencies_ms for number, load in loads.items()}
    if any(percentile(latencies, 99) is None for latencies in samples.values()):
        samples = {POOLED: np.concatenate(list(samples.values()))}
    p50_ms, p99_ms = (
        {number: value for number, latencies in samples.items() if (value := percentile(latencies, rank)) is not None}
        for rank in (50, 99)
    )
    return {
        "images/s": {number: load.throughput for number, load in loads.items()},
        "p50 ms": p50_ms,
        "p99 ms": p99_ms,
        "p99/p50": ratio(p99_ms, p50_ms),
        "idle MB": {number: block.idle_bytes / 1e6 for number, block in blocks.items() if block.idle_bytes},
        "peak MB": {number: load.peak_bytes / 1e6 for number, load in loads.items()},
        "server cores": {number: load.server_cores for number, load in loads.items()},
        "generator cores": {number: load.generator_cores for number, load in loads.items()},
    }


def engine_figures(experiment: LimitExperiment, model: str) -> dict[str, ByRound]:
    """The columns of a model's engine limit by round, where they are known."""
    arm = next(arm for arm in experiment.plan.arms if arm.kind == "engine" and arm.model == model)
    blocks = experiment.blocks_of(arm.label)
    keys = {"images/s": ("images_per_second", 1.0), "idle MB": ("baseline_pss_bytes", 1e6)}
    return {
        figure: {block.round: block.info[name] / unit for block in blocks if block.info[name]}
        for figure, (name, unit) in keys.items()
    }


def ratio(above: ByRound, below: ByRound) -> ByRound:
    """Divide round by round, without infinite values; median by median if one is pooled, or they share no round."""
    above, below = ({n: value for n, value in values.items() if math.isfinite(value)} for values in (above, below))
    if shared := verdicts.ratio(above, below):
        return shared
    if not above or not any(below.values()):
        return {}
    return {POOLED: float(np.median(list(above.values())) / np.median(list(below.values())))}


def ratios(experiment: LimitExperiment) -> list[Ratio]:
    """What the services are judged by, as far as it was measured."""
    models = dict.fromkeys(arm.model for arm in experiment.plan.arms)
    return [found for model in models for found in _ratios(experiment, model) if found.values]


def _ratios(experiment: LimitExperiment, model: str) -> Iterator[Ratio]:
    plan = experiment.plan
    *services, plain = [arm for arm in plan.arms if arm.model == model and arm.kind != "engine"]
    engine = engine_figures(experiment, model)
    limits, alone = engine["images/s"], engine["idle MB"]
    for load in map(closed_name, plan.connections):
        found = {arm: figures(experiment, arm, load) for arm in (*services, plain)}
        for arm, own in found.items():
            growth = {number: 100 * (value - 1) for number, value in ratio(own["peak MB"], own["idle MB"]).items()}
            yield Ratio(name=f"{arm.label} / engine limit, images/s, {load}", values=ratio(own["images/s"], limits))
            yield Ratio(name=f"{arm.label}, p99 / p50, {load}", values=own["p99/p50"])
            yield Ratio(name=f"{arm.label}, peak memory above idle, {load}", values=growth, unit="%")
        for arm, other in [*((arm, plain) for arm in services), *((arm, services[0]) for arm in services[1:])]:
            for figure in ("images/s", "p50 ms"):
                values = ratio(found[arm][figure], found[other][figure])
                yield Ratio(name=f"{arm.label} / {other.label}, {figure.removesuffix(' ms')}, {load}", values=values)
    for arm in services:
        opened, single = (figures(experiment, arm, load) for load in (plan.open_name, closed_name(1)))
        name = f"{arm.label}, p99 in the {plan.open_name} / p50 at {closed_name(1)}"
        yield Ratio(name=name, values=ratio(opened["p99 ms"], single["p50 ms"]))
        above = {number: idle - alone[number] for number, idle in opened["idle MB"].items() if number in alone}
        yield Ratio(name=f"{arm.label} idle, memory above ONNX Runtime and model alone", values=above, unit="MB")


@dataclass(frozen=True, kw_only=True)
class AgainstIdeal:
    """A service in the open loop, and an ideal queue of the same throughput that got the same arrivals."""

    arm: str
    answers: int
    queue: IdealQueue
    """The ideal queue of the last round."""
    p99_ms: float
    ideal_p99_ms: float
    scatter_ms: tuple[float, float] | None
    """5th and 95th percentile of the ideal p99 over other arrivals, of the same total number."""


def against_ideal(experiment: LimitExperiment) -> list[AgainstIdeal]:
    """Every service with enough answers in the open loop, all rounds together."""
    return [
        found for arm in experiment.plan.arms if arm.kind == "service" and (found := _against_ideal(experiment, arm))
    ]


def _against_ideal(experiment: LimitExperiment, arm: Arm) -> AgainstIdeal | None:
    plan = experiment.plan
    engine = next(other for other in plan.arms if other.kind == "engine" and other.model == arm.model)
    lanes = {block.round: block.info.get("engine_lanes", 1) for block in experiment.blocks_of(engine.label)}
    measured, ideal = list[npt.NDArray[np.float64]](), list[npt.NDArray[np.float64]]()
    queue = None
    for block in experiment.blocks_of(arm.label):
        opened, saturated = block.loads.get(plan.open_name), block.loads.get(closed_name(plan.connections[-1]))
        if not (opened and saturated and opened.trace and saturated.throughput and block.round in lanes):
            continue
        queue = IdealQueue(lanes=lanes[block.round], seconds=lanes[block.round] / saturated.throughput)
        measured.append(opened.latencies_ms)
        ideal.append(queue.latencies_ms(np.sort(opened.trace.due_s)))
    if queue is None:
        return None
    latencies, ideals = np.concatenate(measured), np.concatenate(ideal)
    p99_ms, ideal_p99_ms = percentile(latencies, 99), percentile(ideals, 99)
    if p99_ms is None or ideal_p99_ms is None:
        return None
    return AgainstIdeal(
        arm=arm.label,
        answers=len(latencies),
        queue=queue,
        p99_ms=p99_ms,
        ideal_p99_ms=ideal_p99_ms,
        scatter_ms=queue.p99_scatter_ms(plan.load_fraction * queue.lanes / queue.seconds, len(latencies)),
    )


def tables_of(experiment: LimitExperiment) -> list[Table]:
    """Every arm under every load, then the ratios with their intervals; as `limit_tables.txt.j2` lays them out."""
    rows, title = list(_rows(experiment)), _conditions(experiment)
    return tables(
        "limit_tables.txt.j2",
        title=title,
        rows=rows,
        ratios=ratios(experiment),
        ideals=against_ideal(experiment),
        pooled=POOLED,
    )


def _rows(experiment: LimitExperiment) -> Iterator[tuple[str, str, dict[str, ByRound], list[LoadResult]]]:
    for arm in experiment.plan.arms:
        blocks = experiment.blocks_of(arm.label)
        if arm.kind == "engine" and blocks:
            batches = "/".join(dict.fromkeys(str(block.info["batch_size"]) for block in blocks))
            yield arm.label, f"batch {batches}", engine_figures(experiment, arm.model), []
        for load in (load.name for load in experiment.plan.loads(arm)):
            if results := [block.loads[load] for block in blocks if load in block.loads]:
                yield arm.label, load, figures(experiment, arm, load), results


def _conditions(experiment: LimitExperiment) -> str:
    plan = experiment.plan
    services = ", ".join(arm.label for arm in plan.arms if arm.kind == "service")
    return conditions(experiment, f"{services}, {plan.seconds:g} s per load after {plan.warmup_seconds:g} s of warm-up")


def write(experiment: LimitExperiment, out: Path) -> Path:
    """Write `report.md` and `results.json` in the folder `out`, print the tables, and return the report's path."""
    found = tables_of(experiment)
    keys = ("name", "unit", "median", "interval", "values")
    write_experiment(
        experiment,
        out,
        template="limit.md.j2",
        figures={
            "ratios": [{key: getattr(one, key) for key in keys} for one in ratios(experiment)],
            "against_ideal": [asdict(one) for one in against_ideal(experiment)],
        },
        conditions=_conditions(experiment),
        tables=found,
        in_flight=IN_FLIGHT,
        late_ms=LATE_MS,
        versions=next((block.info["versions"] for block in experiment.blocks if "versions" in block.info), {}),
    )
    print_tables(*found, width=190)
    return out / "report.md"
