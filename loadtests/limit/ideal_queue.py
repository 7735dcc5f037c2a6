"""An ideal queue: first come, first served, by lanes that each take the same time for an image, without other costs.

A server of the same throughput can only be better if it computes a lone image with more threads than one of many.

Of the M/D/c family: with Poisson arrivals and one lane it is M/D/1. Latencies follow from the arrivals by the recursion
of Kiefer and Wolfowitz (1955), so that a server can be compared with the ideal for the very arrivals that it got.
"""

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtests.statistics import percentile

_OTHERS = 200
"""Other sets of arrivals from which the scatter is found."""


@dataclass(frozen=True, kw_only=True)
class IdealQueue:
    """What an ideal server of a measured speed would do."""

    lanes: int
    seconds: float
    """Time that a lane takes for an image."""

    def latencies_ms(self, due_s: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """From arrival to answer, for each arrival; they must be in ascending order."""
        free, found = [-np.inf] * self.lanes, np.empty(len(due_s))
        for number, due in enumerate(due_s):
            end = max(due, heapq.heappop(free)) + self.seconds
            heapq.heappush(free, end)
            found[number] = end - due
        return found * 1000

    def p99_scatter_ms(self, rate: float, count: int) -> tuple[float, float] | None:
        """The 5th and 95th percentile of its p99 over other Poisson arrivals; None if they are too few for a p99."""
        generator = np.random.default_rng(0)
        values = []
        for _ in range(_OTHERS):
            due = np.cumsum(generator.exponential(1 / rate, count))
            values.append(percentile(self.latencies_ms(due), 99))
        known = [value for value in values if value is not None]
        return (float(np.percentile(known, 5)), float(np.percentile(known, 95))) if known else None
