"""The figures of the fronts: by front, load and round, with Student's t intervals over rounds."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from loadtests.experiment.model import Block
from loadtests.fronts.measure import FrontsExperiment
from loadtests.fronts.serving import FRONT, LOOP, REQUESTS, SUPERVISOR, WORKER
from loadtests.generator.load_result import LoadResult
from loadtests.limit.measure import closed_name
from loadtests.statistics import paired_difference, paired_ratio, percentile


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure by round; infinite or unknown rounds are left out."""

    rounds: tuple[float, ...]
    pooled: bool = False
    """One value of all rounds together, because single ones have too few answers for it."""

    @property
    def mean(self) -> float:
        """Mean over rounds."""
        return float(np.mean(self.rounds))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's t interval (95 %) of the mean over rounds; None for fewer than five rounds."""
        largest = max(self.rounds, default=math.inf)
        effect = paired_difference(self.rounds, [0.0] * len(self.rounds), ceiling=largest)
        return None if effect is None else effect.at(0.95)[1:]


@dataclass(frozen=True, kw_only=True)
class FrontResult:
    """A front under a load."""

    front: str
    load: str
    figures: Mapping[str, Figure]
    errors: int
    against_first: tuple[float, float, float] | None
    """Throughput against the first front, paired by round: the ratio and its interval."""


def results(experiment: FrontsExperiment) -> list[FrontResult]:
    """Every front under every load that it was measured with."""
    plan = experiment.plan
    first = plan.arms[0].label
    found = []
    for arm in plan.arms:
        for load in (load.name for load in plan.loads(arm)):
            loads = _loads(experiment, arm.label, load)
            if not loads:
                continue
            found.append(
                FrontResult(
                    front=arm.label,
                    load=load,
                    figures=_figures(loads),
                    errors=sum(one.errors for one in loads.values()),
                    against_first=_ratio(loads, _loads(experiment, first, load)) if arm.label != first else None,
                )
            )
    return found


def unevenness(loads: LoadResult) -> float | None:
    """How far the worker with the most or the fewest requests is from the mean of all, as a fraction of it."""
    parts = _of_workers(loads.counts, REQUESTS)
    mean = float(np.mean(parts)) if len(parts) > 1 else 0.0
    return max(abs(part - mean) for part in parts) / mean if mean else None


def sizing_figures(experiment: FrontsExperiment) -> dict[str, dict[str, float | None]]:
    """What capacity planning needs, by front; means over rounds. See `loadtests.capacity.sizing.Figures`."""
    plan = experiment.plan
    saturated, alone = closed_name(plan.connections[-1]), closed_name(plan.connections[0])
    found: dict[str, dict[str, float | None]] = {}
    for arm in plan.arms:
        blocks = experiment.blocks_of(arm.label)
        busy, idle = (_figures(_loads(experiment, arm.label, load)) for load in (saturated, alone))
        if not blocks or not busy:
            continue
        values = {name: busy[key].mean if key in busy else None for name, key in _SIZING.items()}
        values["alone_ms"] = idle["p50 ms"].mean if "p50 ms" in idle else None
        facts = ("worker_bytes", "front_bytes", "request_bytes", "response_bytes")
        found[arm.label] = values | {name: float(np.mean([block.info[name] for block in blocks])) for name in facts}
    return found


_SIZING = {"worker_cpu_ms": "worker CPU ms", "front_cpu_ms": "front CPU ms", "loop_cpu_ms": "loop CPU ms"}


def _loads(experiment: FrontsExperiment, label: str, load: str) -> dict[int, LoadResult]:
    blocks: list[Block] = experiment.blocks_of(label)
    return {block.round: block.loads[load] for block in blocks if load in block.loads}


def _figures(loads: Mapping[int, LoadResult]) -> dict[str, Figure]:
    columns: dict[str, list[float | None]] = {}
    for load in loads.values():
        for name, value in _of_round(load):
            columns.setdefault(name, []).append(value)
    known = {name: tuple(_finite(values)) for name, values in columns.items()}
    found = {name: Figure(rounds=values) for name, values in known.items() if values}
    if loads and len(known.get("p99 ms", ())) < len(loads):
        pooled = percentile(np.concatenate([load.latencies_ms for load in loads.values()]), 99)
        found.pop("p99 ms", None)
        if pooled is not None and math.isfinite(pooled):
            found["p99 ms"] = Figure(rounds=(pooled,), pooled=True)
    return found


def _finite(values: list[float | None]) -> Iterator[float]:
    return (value for value in values if value is not None and math.isfinite(value))


def _of_round(load: LoadResult) -> Iterator[tuple[str, float | None]]:
    yield "requests/s", load.throughput
    yield "p50 ms", percentile(load.latencies_ms, 50)
    yield "p99 ms", percentile(load.latencies_ms, 99)
    yield "unevenness", unevenness(load)
    workers, loops = (_of_workers(load.part_cores, name) for name in (WORKER, LOOP))
    cores = {
        "worker CPU ms": sum(workers) if workers else None,
        "loop CPU ms": sum(loops) if loops else None,
        "front CPU ms": load.part_cores.get(FRONT),
        "supervisor CPU ms": load.part_cores.get(SUPERVISOR),
    }
    for name, value in cores.items():
        yield name, value / load.throughput * 1000 if value is not None and load.throughput else None


def _of_workers(values: Mapping[str, float], name: str) -> list[float]:
    beginning = name.format("")
    return [value for key, value in values.items() if key.startswith(beginning)]


def _ratio(loads: Mapping[int, LoadResult], others: Mapping[int, LoadResult]) -> tuple[float, float, float] | None:
    shared = sorted(loads.keys() & others.keys())
    effect = paired_ratio([loads[at].throughput for at in shared], [others[at].throughput for at in shared])
    return None if effect is None else effect.at(0.95)
