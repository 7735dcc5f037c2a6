"""How sure a difference between two arms is: paired rounds, Student's t, and Holm's levels over a whole report.

The rounds are the blocks of the design: what slows a whole round hits all arms alike, so each round gives one paired
difference (of log throughput, of log peak memory, of the round's own percentile of latency), and the interval is their
mean ± t * standard error. The standard error s / sqrt(n) is that of the paired block bootstrap, drawn infinitely often
and freed of its bias (Efron & Tibshirani 1993, ch. 5), so no random numbers are needed.

Why neither the bootstrap's percentiles nor percentiles of pooled latencies: if two arms are equal, they can be
exchanged within any round, so every paired difference, of whatever statistic, is symmetric about zero; Student's t
then keeps its level, and outliers make it cautious (Efron 1969). Simulated at 10 rounds, with Holm's first level for
27 tests (3 arms, 9 figures; 5 % / 27 a test), 20,000 or more pairs of arms, 1,500 or more for the power; the first two
numbers are 27 times the probability of a false alarm in one test, which bounds a report's, the next two the probability
that 10 % less throughput is found amid 3.5 % of noise in each block:

    ====================================  ======  =====  ============  ========
    method                                normal  t3     found normal  found t3
    ====================================  ======  =====  ============  ========
    Student's t of the paired rounds      5.2 %   3.1 %  96 %          94 %
    bootstrap-t (Hall 1988)               3.1 %   0.8 %  73 %          77 %
    t of means trimmed by 1 + 1 (Yuen)    6.3 %   4.1 %  87 %          95 %
    ====================================  ======  =====  ============  ========

A sign-flip test cannot go below p = 2 / 2**10, too coarse for 27 tests. Of latencies, the difference of percentiles
pooled over all rounds raised false alarms (again 27 times the probability in a test) in up to 142 % with the
jackknife's standard error and up to 59 % with the bootstrap's, the worst being p99 where rounds differ more than the
requests within: one or two rounds decide it (3,000 pairs each). The differences of the rounds' own percentiles gave
0.4 to 6 % in the same cases (15,000 to 75,000 pairs), down to 60 requests a block, and found as much. (The percentile
of a block with few samples lies nearer to the middle than that of many; it does so for both arms.)

Whole reports of equal arms, 8,000 or more of each kind, block noise normal or t3, figures correlated by 0 to 0.9,
with and without blocks in which everything stalls: any alarm in 1.0 to 4.7 % at 10 rounds, 2.0 to 4.8 % at 5, and 0.2
to 4.9 % at 20 and 30. At 10 rounds, stalls of 20 to 70 % in every twentieth block cut the power from 96 to 39 %: more
rounds, or a quieter machine, are the remedy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

MIN_ROUNDS = 5
"""Fewer give no interval: Student's t with three degrees of freedom or less says hardly anything."""
MIN_BEYOND = 5
"""Samples that must lie beyond a percentile for it to be given."""

Values = npt.NDArray[np.float64] | Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """How far one arm lies from another, on a scale on which 0 is no difference, and how well that is known."""

    centre: float
    error: float
    """Standard error."""
    freedom: int | None
    """Degrees of freedom of the standard error; None: so many that the normal distribution holds."""
    ratio: bool = False
    """`centre` is a logarithm, and figures are given as ratios."""
    open_above: bool = False
    """A finite value stood in for infinite ones of the arm: nothing bounds the effect above."""
    open_below: bool = False
    """Likewise the baseline's."""

    @property
    def p_value(self) -> float:
        """Two-sided, for no difference."""
        if self.error == 0:
            return 1.0 if self.centre == 0 else 0.0
        return tail(abs(self.centre) / self.error, self.freedom)

    def at(self, level: float) -> tuple[float, float, float]:
        """Estimate and both ends of the interval at this confidence (0.95, ...): ratios, or differences in their unit.

        It holds no difference exactly if the p-value exceeds 1 - level.
        """
        reach = critical(1 - level, self.freedom) * self.error if self.error else 0.0
        low, high = self.centre - reach, self.centre + reach
        if self.ratio:
            return math.exp(self.centre), math.exp(low), math.exp(high)
        centre = self.centre
        # An end is let go only where zero lies on this side of it: the verdict is that of the finite stand-ins.
        if self.open_above and high >= 0:
            high = math.inf
            centre = centre if self.open_below else math.inf
        if self.open_below and low <= 0:
            low = -math.inf
            centre = centre if self.open_above else -math.inf
        return centre, low, high


def paired_ratio(arm: Values, baseline: Values) -> Effect | None:
    """Of positive values, one of each arm a round, in the same order of rounds: the geometric mean of arm / baseline.

    None for fewer than five rounds, and where a value is not positive (throughput of a server that answered nothing).
    """
    ours, theirs = _logs(arm), _logs(baseline)
    return None if ours is None or theirs is None else _of_differences(ours - theirs, ratio=True)


def paired_difference(arm: Values, baseline: Values, *, ceiling: float) -> Effect | None:
    """Of values that may be infinite, one of each arm a round, in the same order of rounds: the mean of arm - baseline.

    `ceiling` stands in for infinite values: the largest finite latency of either arm, which those that were never
    answered would have exceeded. So the end of the interval nearer to zero is, if anything, too near; the other one is
    given as infinite. None for fewer than five rounds, and if there is no finite `ceiling`.
    """
    above, below = (np.isinf(np.asarray(values, dtype=np.float64)) for values in (arm, baseline))
    if not math.isfinite(ceiling):
        return None
    differences = np.where(above, ceiling, arm) - np.where(below, ceiling, baseline)
    return _of_differences(differences, open_above=bool(above.any()), open_below=bool(below.any()))


def unpaired_ratio(new: Values, old: Values) -> Effect | None:
    """Of positive values of two runs that share no rounds: the ratio of geometric means (Welch 1947).

    None for fewer than five values of either, and where a value is not positive.
    """
    fresh, former = _logs(new), _logs(old)
    if fresh is None or former is None or min(len(fresh), len(former)) < MIN_ROUNDS:
        return None
    one, other = float(fresh.var(ddof=1)) / len(fresh), float(former.var(ddof=1)) / len(former)
    freedom = len(fresh) + len(former) - 2
    if one + other > 0:
        # Rounded down: cautious, and with a closed form of the distribution.
        freedom = math.floor((one + other) ** 2 / (one**2 / (len(fresh) - 1) + other**2 / (len(former) - 1)))
    return Effect(
        centre=float(fresh.mean() - former.mean()), error=math.sqrt(one + other), freedom=max(freedom, 1), ratio=True
    )


def difference_of_shares(arm: float, arm_count: int, baseline: float, baseline_count: int) -> Effect | None:
    """Of two shares of correct answers, of so many images each: arm - baseline.

    As if each had been asked other images. Of the same images it is too cautious, because both find the same ones hard;
    but which ones each got right is not in a manifest. The standard error is that of Agresti & Caffo (2000: one more
    right and one more wrong answer each), so that it is never zero. None for no images.
    """
    if arm_count < 1 or baseline_count < 1:
        return None
    variance = 0.0
    for share, count in ((arm, arm_count), (baseline, baseline_count)):
        shrunk = (share * count + 1) / (count + 2)
        variance += shrunk * (1 - shrunk) / (count + 2)
    return Effect(centre=arm - baseline, error=math.sqrt(variance), freedom=None)


@dataclass(frozen=True, kw_only=True)
class Holm:
    """What Holm's procedure makes of one test among several."""

    rejected: bool
    level: float
    """Confidence of the interval that belongs to it: it excludes no difference exactly if the test is rejected."""
    p_value: float
    """Adjusted: at most `alpha` exactly if the test is rejected."""


def holm(p_values: Sequence[float], alpha: float) -> list[Holm]:
    """Test all at once, so that any false alarm at all has a probability of at most `alpha` (Holm 1979).

    The k-th smallest of m p-values is held against alpha / (m - k + 1), until the first one that exceeds it; that one
    and all larger ones are not rejected. A rejected test's interval has the level 1 - alpha / (m - k + 1), all others
    have the level at which the procedure stopped: as their p-values exceed that alpha, their intervals hold no
    difference. What is promised is that the verdicts err in at most `alpha` of the reports; that all intervals cover
    the truth at once would need the level 1 - alpha / m for each.
    """
    count = len(p_values)
    results: dict[int, Holm] = {}
    stopped, adjusted = None, 0.0
    for place, number in enumerate(sorted(range(count), key=lambda number: p_values[number])):
        share = alpha / (count - place)
        adjusted = max(adjusted, min(1.0, p_values[number] * (count - place)))
        if stopped is None and p_values[number] > share:
            stopped = share
        results[number] = Holm(rejected=stopped is None, level=1 - (stopped or share), p_value=adjusted)
    return [results[number] for number in range(count)]


def percentile(samples: Values, rank: float) -> float | None:
    """The `rank`-th percentile (0 to 100) of samples that may be infinite; None where fewer than five lie beyond it."""
    if len(samples) * (100 - rank) / 100 < MIN_BEYOND - 1e-9:
        return None
    return interpolated(samples, rank)


def interpolated(samples: Values, rank: float) -> float:
    """The `rank`-th percentile however few samples there are; infinite (never nan) where a neighbour is.

    Interpolates linearly, as `numpy.percentile` does. Raises ValueError if there is no sample.
    """
    if not len(samples):
        raise ValueError("no samples: there is no percentile")
    position = (len(samples) - 1) * rank / 100
    below = math.floor(position)
    above = min(below + 1, len(samples) - 1)
    parted = np.partition(np.asarray(samples, dtype=np.float64), (below, above))
    low, high, share = float(parted[below]), float(parted[above]), position - below
    # At share 0 the neighbour above does not count: 0 * infinite would be nan.
    if share == 0 or low == high:
        return low
    return low + (high - low) * share


def tail(t: float, freedom: int | None) -> float:
    """Probability that Student's t with so many whole degrees of freedom lies beyond ±t; None: the normal distribution.

    By the finite series of Abramowitz & Stegun (1964), 26.7.3 and 26.7.4; right to about 1e-15, absolute.
    """
    if freedom is None:
        return 2 * NormalDist().cdf(-abs(t))
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    within = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return max(0.0, 1 - within)


def critical(alpha: float, freedom: int | None) -> float:
    """The t beyond which, on either side, `alpha` (0 to 1, neither) of the distribution lies: the reverse of `tail`."""
    if freedom is None:
        return -NormalDist().inv_cdf(alpha / 2)
    low, high = 0.0, 1.0
    while tail(high, freedom) > alpha:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > alpha else (low, middle)
    return (low + high) / 2


def _of_differences(
    differences: npt.NDArray[np.float64], *, ratio: bool = False, open_above: bool = False, open_below: bool = False
) -> Effect | None:
    count = len(differences)
    if count < MIN_ROUNDS:
        return None
    centre, spread = float(differences.mean()), float(differences.std(ddof=1))
    return Effect(
        centre=centre,
        error=spread / math.sqrt(count),
        freedom=count - 1,
        ratio=ratio,
        open_above=open_above,
        open_below=open_below,
    )


def _logs(values: Values) -> npt.NDArray[np.float64] | None:
    array = np.asarray(values, dtype=np.float64)
    return np.log(array) if bool((array > 0).all()) and bool(np.isfinite(array).all()) else None
