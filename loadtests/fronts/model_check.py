"""The queueing model against a measured point: the open loop of `loadtest fronts`, at a known load.

The throughput and latency that a block found in its closed loops predict its open loop: a request takes c ÷ the
saturated throughput on one of c servers, and one that does not wait takes the median latency of a lone connection.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from loadtests.capacity.queueing import DeterministicQueue
from loadtests.fronts.figures import Figure
from loadtests.fronts.measure import FrontsExperiment
from loadtests.generator.load_result import LoadResult
from loadtests.limit.measure import closed_name
from loadtests.statistics import percentile

_RANKS = (50.0, 99.0)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A percentile of a front's open loop, predicted and measured, by round."""

    front: str
    percentile: float
    load: Figure
    """Arrivals as a fraction of the saturated throughput."""
    measured_ms: Figure
    one_queue_ms: Figure
    """Predicted for one queue in front of all servers: the best that a front can do."""
    random_ms: Figure | None
    """Predicted for workers that get their requests at random; None for one process."""
    ratio: Figure
    """Measured ÷ predicted, for one queue."""


def checked(experiment: FrontsExperiment) -> list[Checked]:
    """Every front with an open loop, and every percentile for which there are enough answers."""
    return [found for arm in experiment.plan.arms for rank in _RANKS for found in _checked(experiment, arm.label, rank)]


def _checked(experiment: FrontsExperiment, label: str, rank: float) -> Iterator[Checked]:
    plan = experiment.plan
    rows = []
    for block in experiment.blocks_of(label):
        opened = block.loads.get(plan.open_name)
        if opened is None:
            continue
        busy, alone = (block.loads[closed_name(plan.connections[at])] for at in (-1, 0))
        row = _row(opened, busy, alone, rank, servers=int(block.info["servers"]), workers=int(block.info["workers"]))
        if row is not None:
            rows.append(row)
    if rows:
        load, measured, one_queue, at_random = (tuple(float(row[at]) for row in rows) for at in range(4))
        yield Checked(
            front=label,
            percentile=rank,
            load=Figure(rounds=load),
            measured_ms=Figure(rounds=measured),
            one_queue_ms=Figure(rounds=one_queue),
            random_ms=Figure(rounds=at_random) if experiment.blocks_of(label)[0].info["workers"] > 1 else None,
            ratio=Figure(rounds=tuple(np.divide(measured, one_queue).tolist())),
        )


def _row(
    opened: LoadResult, busy: LoadResult, alone: LoadResult, rank: float, *, servers: int, workers: int
) -> tuple[float, float, float, float] | None:
    """Load, and milliseconds: measured, for one queue, and for workers at random; None where they are not known."""
    measured, lone = percentile(opened.latencies_ms, rank), percentile(alone.latencies_ms, 50)
    rate = opened.arrivals and opened.offered_rate
    if measured is None or lone is None or not rate or not np.isfinite([measured, lone]).all():
        return None
    seconds = servers / busy.throughput
    one_queue = DeterministicQueue(servers, seconds, rate).wait_seconds(rank)
    at_random = DeterministicQueue(servers // workers, seconds, rate / workers).wait_seconds(rank)
    return rate / busy.throughput, measured, lone + one_queue * 1000, lone + at_random * 1000
