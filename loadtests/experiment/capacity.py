"""The largest rate of arrivals at which a server meets a latency objective, by bisection."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from loadtests.experiment.model import CapacitySearch, ComparisonPlan
from loadtests.statistics import MIN_BEYOND

PROBES = 5
"""Probes of one bisection: they narrow the rate down to a 32nd of the first interval."""
MOST_SECONDS = 60.0
"""Longest probe."""

_LOWEST, _HIGHEST = 0.2, 1.1
"""Where the bisection begins, as fractions of the saturated throughput."""


def probe_seconds(plan: ComparisonPlan, rate: float) -> float:
    """How long a probe at that rate must be, so that enough latencies lie beyond the objective's percentile."""
    return max(plan.seconds, MIN_BEYOND / (1 - plan.objective_percentile / 100) / rate)


def find_capacity(
    plan: ComparisonPlan,
    arm: str,
    round_number: int,
    *,
    saturated: float,
    probe: Callable[[float, float, int], npt.NDArray[np.float64]],
) -> CapacitySearch:
    """Halve the interval between a rate that meets the objective and one that does not, `PROBES` times.

    A rate meets it if `objective_percentile` % of the images, sent and answered, took at most `objective_ms`.
    `probe(rate, seconds, number)` returns latencies in ms. The result met the objective, so it may be too low: by the
    remaining interval, and because a probe that was slow by chance is not repeated. More searches show by how much.
    """
    low, high = 0.0, _HIGHEST * saturated
    probes: list[tuple[float, float | None]] = []
    reason = None if saturated > 0 else "nothing was answered at saturation"
    while len(probes) < PROBES and reason is None:
        rate = (max(low, _LOWEST * saturated) + high) / 2
        seconds = probe_seconds(plan, rate)
        if seconds > MOST_SECONDS:
            reason = (
                f"p{plan.objective_percentile:g} at {rate:.3g}/s needs a probe of {seconds:.0f} s, more than "
                f"{MOST_SECONDS:.0f}: give a lower --objective-percentile"
            )
            break
        latencies = probe(rate, seconds, len(probes))
        reached = np.percentile(latencies, plan.objective_percentile, method="higher") if len(latencies) else np.inf
        probes.append((rate, float(reached) if np.isfinite(reached) else None))
        low, high = (rate, high) if reached <= plan.objective_ms else (low, rate)
    found = None if reason else low
    return CapacitySearch(arm=arm, round=round_number, rate=found, probes=tuple(probes), reason=reason)
