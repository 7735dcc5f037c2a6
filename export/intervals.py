"""Ratios of speed and their confidence intervals, from measurements that alternate in rounds."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import ttest_1samp

MIN_ROUNDS_FOR_INTERVAL = 5


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A ratio to the baseline and its 95 % confidence interval; None for too few rounds."""

    ratio: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"×{self.ratio:.2f}"
        return f"×{self.ratio:.2f} ({self.low:.2f}–{self.high:.2f})"


def paired_ratio(rates: npt.NDArray[np.float64], baseline: npt.NDArray[np.float64]) -> Interval:
    """Ratio of two series of rates measured round by round, both (rounds,).

    The interval is Student's t for the mean of the logarithms of the rounds' ratios: it pairs measurements that are
    adjacent in time, and keeps its coverage for few rounds, where a percentile bootstrap is too narrow.
    """
    logs = np.log(rates / baseline)
    ratio = float(np.exp(logs.mean()))
    if len(logs) < MIN_ROUNDS_FOR_INTERVAL or np.ptp(logs) == 0:
        return Interval(ratio=ratio, low=None, high=None)
    found = ttest_1samp(logs, 0).confidence_interval(0.95)
    return Interval(ratio=ratio, low=float(np.exp(found.low)), high=float(np.exp(found.high)))
