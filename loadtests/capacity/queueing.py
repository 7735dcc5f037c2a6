"""The M/D/c queue: Poisson arrivals, c servers that each take the same time for a request, first come, first served.

Exact, not simulated: `loadtests.limit.ideal_queue` simulates the same queue for given arrivals, and tests compare the
two. With one server it is M/D/1, whose mean wait is that of Pollaczek and Khinchine.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

HIGHEST_LOAD = 0.98
"""At a higher load the queue is too long for the tables here, and its tail is of no practical use."""
_NEGLIGIBLE = 1e-10


@dataclass(frozen=True)
class DeterministicQueue:
    """An M/D/c queue. Raises ValueError unless 0 < load <= `HIGHEST_LOAD` and there is a server."""

    servers: int
    seconds: float
    """Time that a server takes for a request."""
    rate: float
    """Arrivals per second."""

    def __post_init__(self) -> None:
        if self.servers < 1 or self.seconds <= 0 or not 0 < self.load <= HIGHEST_LOAD:
            raise ValueError(
                f"a load of {self.load:.3g} on {self.servers} servers: it must be above 0 and at most {HIGHEST_LOAD}"
            )

    @property
    def load(self) -> float:
        """The utilisation of the servers."""
        return self.rate * self.seconds / self.servers

    @property
    def mean_wait_seconds(self) -> float:
        """Mean wait before a request is begun, by Little's law."""
        numbers = np.arange(len(self._in_system))
        waiting = float(np.maximum(numbers - self.servers, 0) @ self._in_system)
        return waiting / self.rate

    def waits_at_most(self, seconds: float) -> float:
        """The probability that a request waits at most `seconds` (Franx 2001, equation 1)."""
        if seconds < 0:
            return 0.0
        spans = int(seconds / self.seconds) + 1
        mean = self.rate * (spans * self.seconds - seconds)
        arrivals = np.arange(spans * self.servers)
        # Q(m): at most m requests wait, so at most m + c are in the system.
        most = np.minimum(spans * self.servers - 1 - arrivals + self.servers, len(self._at_most) - 1)
        return min(1.0, float(stats.poisson.pmf(arrivals, mean) @ self._at_most[most]))

    def wait_seconds(self, percentile: float) -> float:
        """The wait that `percentile` per cent of the requests do not exceed."""
        wanted = percentile / 100
        if self.waits_at_most(0.0) >= wanted:
            return 0.0
        high = self.seconds
        while self.waits_at_most(high) < wanted:
            high *= 2
        return float(optimize.brentq(lambda wait: self.waits_at_most(wait) - wanted, 0.0, high, xtol=1e-9))

    @cached_property
    def _in_system(self) -> npt.NDArray[np.float64]:
        """Probability of each number of requests in the system, in the steady state.

        After one service time, all that were in service are gone, and all that arrived meanwhile are in the system:
        N' = max(N - c, 0) + Poisson(rate · seconds) (Crommelin 1932).
        """
        size = self._size()
        arrivals = stats.poisson.pmf(np.arange(size), self.rate * self.seconds)
        moves = np.zeros((size, size))
        for number in range(size):
            left = max(number - self.servers, 0)
            moves[number, left:] = arrivals[: size - left]
            # Probability beyond the table is added to its last entry.
            moves[number, -1] += 1 - moves[number].sum()
        equations = np.vstack([(moves.T - np.eye(size))[:-1], np.ones(size)])
        found: npt.NDArray[np.float64] = np.maximum(np.linalg.solve(equations, np.eye(size)[-1]), 0)
        found /= found.sum()
        return found

    @cached_property
    def _at_most(self) -> npt.NDArray[np.float64]:
        return np.cumsum(self._in_system)

    def _size(self) -> int:
        """Table size that leaves a negligible rest: the tail falls geometrically, by the root of e^λD(z-1) = z^c."""
        offered = self.rate * self.seconds
        root = (
            optimize.brentq(
                lambda z: offered * (z - 1) - self.servers * np.log(z),
                1 + (self.servers - offered) / offered * 1e-3 + 1e-12,
                2 + 2 * self.servers / offered * np.log(1 + self.servers / offered),
            )
            if offered < self.servers
            else 2.0
        )
        return int(2 * self.servers + 10 + np.log(1 / _NEGLIGIBLE) / np.log(root))
