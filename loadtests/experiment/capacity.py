"""The largest rate of arrivals at which a server keeps a latency objective, by bisection."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtests.experiment.model import CapacitySearch
from loadtests.statistics import MIN_BEYOND

PROBES = 5
"""Probes of one bisection: they narrow the rate down to a 32nd of the first interval."""
MOST_SECONDS = 60.0
"""Longest probe."""

_LOWEST, _HIGHEST = 0.2, 1.1
"""Where the bisection begins, as fractions of the saturated throughput."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """`percentile` % of the images, sent and answered, within `ms`."""

    ms: float
    percentile: float

    def kept(self, latencies_ms: npt.NDArray[np.float64]) -> tuple[bool, float | None]:
        """Whether it was kept, and the latency at the percentile; None if that request was not answered."""
        if not len(latencies_ms):
            return False, None
        reached = float(np.percentile(latencies_ms, self.percentile, method="higher"))
        return reached <= self.ms, reached if np.isfinite(reached) else None

    def probe_seconds(self, rate: float, at_least: float) -> float:
        """How long a probe at that rate must be, so that enough latencies lie beyond the percentile."""
        return max(at_least, MIN_BEYOND / (1 - self.percentile / 100) / rate)


def find_capacity(
    arm: str,
    round_number: int,
    objective: Objective,
    *,
    saturated: float,
    seconds: float,
    probe: Callable[[float, float, int], npt.NDArray[np.float64]],
) -> CapacitySearch:
    """Halve the interval between a rate that keeps the objective and one that does not, `PROBES` times.

    `probe(rate, seconds, number)` returns latencies in ms. The result kept the objective, so it may be too low by the
    remaining interval, and by a probe that was slow by chance and is not repeated: more searches show how much that is.
    """
    low, high = 0.0, _HIGHEST * saturated
    probes: list[tuple[float, float | None]] = []

    def without_rate(reason: str) -> CapacitySearch:
        return CapacitySearch(arm=arm, round=round_number, rate=None, probes=tuple(probes), reason=reason)

    if saturated <= 0:
        return without_rate("nothing was answered at saturation")
    for number in range(PROBES):
        rate = (max(low, _LOWEST * saturated) + high) / 2
        needed = objective.probe_seconds(rate, seconds)
        if needed > MOST_SECONDS:
            return without_rate(
                f"p{objective.percentile:g} at {rate:.3g}/s needs a probe of {needed:.0f} s, more than "
                f"{MOST_SECONDS:.0f}: give a lower --objective-percentile"
            )
        kept, reached = objective.kept(probe(rate, needed, number))
        probes.append((rate, reached))
        low, high = (rate, high) if kept else (low, rate)
    return CapacitySearch(arm=arm, round=round_number, rate=low, probes=tuple(probes))
