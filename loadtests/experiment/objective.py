"""The largest rate of arrivals at which a server keeps a latency objective, by bisection."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtests.experiment.model import CapacitySearch
from loadtests.experiment.schedule import PROBES

MOST_SECONDS = 60.0
"""Of one probe."""
BEYOND = 5
"""Latencies that must lie beyond a percentile, for it to be believed."""

_LOWEST, _HIGHEST = 0.2, 1.1
"""Of the saturated throughput: where the bisection begins."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """`percentile` % of the images, sent and answered, within `ms`."""

    ms: float
    percentile: float

    def kept(self, latencies_ms: npt.NDArray[np.float64]) -> tuple[bool, float | None]:
        """Whether it was, and the latency at the percentile; None if that request was not answered."""
        if not len(latencies_ms):
            return False, None
        reached = float(np.percentile(latencies_ms, self.percentile, method="higher"))
        return reached <= self.ms, reached if np.isfinite(reached) else None

    def probe_seconds(self, rate: float, at_least: float) -> float:
        """How long a probe must be, at that rate, to show the percentile."""
        return max(at_least, BEYOND / (1 - self.percentile / 100) / rate)


def largest_rate(
    arm: str,
    round_number: int,
    objective: Objective,
    *,
    saturated: float,
    seconds: float,
    probe: Callable[[float, float, int], npt.NDArray[np.float64]],
) -> CapacitySearch:
    """Halve the interval between a rate that keeps the objective and one that does not, `PROBES` times.

    `probe(rate, seconds, number)` gives latencies in ms. The rate that is found kept it; so it may be too low by what
    is left of the interval, and a probe that chance made too slow is not asked again: repeat the search to see how
    much that is.
    """
    low, high = 0.0, _HIGHEST * saturated
    probes: list[tuple[float, float | None]] = []
    if saturated <= 0:
        return CapacitySearch(
            arm=arm, round=round_number, rate=None, probes=(), reason="nothing was answered at saturation"
        )
    for number in range(PROBES):
        rate = (max(low, _LOWEST * saturated) + high) / 2
        needed = objective.probe_seconds(rate, seconds)
        if needed > MOST_SECONDS:
            return CapacitySearch(
                arm=arm,
                round=round_number,
                rate=None,
                probes=tuple(probes),
                reason=f"p{objective.percentile:g} at {rate:.3g}/s needs a probe of {needed:.0f} s, more than "
                f"{MOST_SECONDS:.0f}: ask for a lower --objective-percentile",
            )
        kept, reached = objective.kept(probe(rate, needed, number))
        probes.append((rate, reached))
        low, high = (rate, high) if kept else (low, rate)
    return CapacitySearch(arm=arm, round=round_number, rate=low, probes=tuple(probes))
