"""How sure a difference is: Student's t over paired rounds, exact tests of right answers, Holm's levels for a report.

Rounds are what repeats. What slows a whole round down hits all arms alike, so each round gives one paired difference
(of log throughput, of log peak memory, of the round's own percentile of latency), and the interval is that of
Student's t over rounds.

Why not the bootstrap, and not percentiles of the pooled latencies? Equal arms can be exchanged within any round, so
every paired difference is symmetric about zero whatever it is of; Student's t then keeps its level, and outliers make
it cautious (Efron 1969). Simulated with 27 tests on equal arms at 10 rounds, with normal and heavy-tailed noise: t
raises any alarm in 1 to 5 % of the reports, as it should; a percentile bootstrap in 40 %. Percentiles pooled over
rounds raise up to 28 times as many as they should, because one or two rounds decide them. A bootstrap-t (Hall 1988)
keeps its level, but detects 10 % less throughput amid 3.5 % of noise in only 73 % of the cases, t in 96 %. Where every
twentieth block stalls by 20 to 70 %, t detects it in 39 %: more rounds, or a quieter machine, are the remedy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

MIN_ROUNDS = 5
"""With fewer there is no interval: Student's t with three degrees of freedom or less says hardly anything."""
MIN_BEYOND = 5
"""Samples that must lie beyond a percentile for it to be given."""

Values = npt.NDArray[np.float64] | Sequence[float]
Answers = npt.NDArray[np.bool_] | Sequence[bool]
"""Whether each image of a set was answered right, in the order of the set."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The difference of two arms, on a scale on which 0 is no difference, and its uncertainty."""

    centre: float
    """Middle of the interval."""
    error: float
    """Standard error."""
    df: float = math.inf
    """Degrees of freedom of the standard error; infinite for the normal distribution."""
    ratio: bool = False
    """`centre` is a logarithm; estimate and interval are given as ratios."""
    open_above: bool = False
    """A finite value stood in for infinite ones of the arm: the interval has no upper end."""
    open_below: bool = False
    """The same for the baseline: the interval has no lower end."""
    estimate: float | None = None
    """The estimate, if it is not `centre`."""
    exact_p_value: float | None = None
    """p-value of an exact test, if there is one."""
    bound: float = math.inf
    """The largest difference that is possible."""

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the hypothesis of no difference."""
        if self.exact_p_value is not None:
            return self.exact_p_value
        if self.error == 0:
            return 1.0 if self.centre == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.centre) / self.error, self.df))

    def at(self, level: float) -> tuple[float, float, float]:
        """Estimate and both ends of the interval at this confidence (0.95, ...): ratios, or differences in their unit.

        It excludes no difference exactly if the p-value is below 1 - level; with an exact test, up to its rounding.
        """
        reach = float(stats.t.isf((1 - level) / 2, self.df)) * self.error if self.error else 0.0
        estimate = self.centre if self.estimate is None else self.estimate
        low, high = max(self.centre - reach, -self.bound), min(self.centre + reach, self.bound)
        if self.ratio:
            return math.exp(estimate), math.exp(low), math.exp(high)
        # An end becomes infinite only if zero lies on the other side: the verdict stays that of the finite stand-ins.
        if self.open_above and high >= 0:
            high = math.inf
            estimate = estimate if self.open_below else math.inf
        if self.open_below and low <= 0:
            low = -math.inf
            estimate = estimate if self.open_above else -math.inf
        return estimate, low, high


def paired_ratio(arm: Values, baseline: Values) -> Effect | None:
    """The geometric mean of arm / baseline, for positive values of the same rounds in the same order.

    None for fewer than five rounds, and where a value is not positive (throughput of a server that answered nothing).
    """
    ours, theirs = _logs(arm), _logs(baseline)
    return None if ours is None or theirs is None else _mean(ours - theirs, ratio=True)


def paired_difference(arm: Values, baseline: Values, *, ceiling: float) -> Effect | None:
    """The mean of arm - baseline, for values of the same rounds in the same order, which may be infinite.

    `ceiling` stands in for infinite values: the largest finite latency of either arm, which requests without an answer
    would have exceeded. So the end of the interval nearer to zero is, if anything, too near; the other one is given as
    infinite. None for fewer than five rounds, and if `ceiling` is not finite.
    """
    above, below = (np.isinf(np.asarray(values, dtype=np.float64)) for values in (arm, baseline))
    if not math.isfinite(ceiling):
        return None
    differences = np.where(above, ceiling, arm) - np.where(below, ceiling, baseline)
    return _mean(differences, open_above=bool(above.any()), open_below=bool(below.any()))


def unpaired_ratio(new: Values, old: Values) -> Effect | None:
    """The ratio of geometric means of positive values from two runs that share no rounds (Welch 1947).

    None for fewer than five values of either, and where a value is not positive.
    """
    fresh, former = _logs(new), _logs(old)
    if fresh is None or former is None or min(len(fresh), len(former)) < MIN_ROUNDS:
        return None
    one, other = float(stats.sem(fresh)), float(stats.sem(former))
    error = math.hypot(one, other)
    df = error**4 / (one**4 / (len(fresh) - 1) + other**4 / (len(former) - 1)) if error else math.inf
    return Effect(centre=float(fresh.mean() - former.mean()), error=error, df=df, ratio=True)


def paired_proportions(correct: Answers, baseline: Answers) -> Effect | None:
    """Percentage points of right answers above the baseline's, from which of the same images each has right.

    The p-value is that of the exact McNemar test. The interval is Wald's with half an image added to each of the four
    cells, which keeps its level for few images too (Agresti and Min 2005). None for no images.
    """
    ours, theirs = np.asarray(correct, dtype=bool), np.asarray(baseline, dtype=bool)
    if not len(ours):
        return None
    only_arm, only_baseline, count = int((ours & ~theirs).sum()), int((theirs & ~ours).sum()), len(ours) + 2
    difference, discordant = only_arm - only_baseline, only_arm + only_baseline
    return Effect(
        estimate=100 * difference / len(ours),
        centre=100 * difference / count,
        error=100 * math.sqrt(discordant + 1 - difference**2 / count) / count,
        exact_p_value=float(stats.binomtest(only_arm, discordant).pvalue) if discordant else 1.0,
        bound=100,
    )


def independent_proportions(arm: float, arm_count: int, baseline: float, baseline_count: int) -> Effect | None:
    """Percentage points between two shares (0 to 1) of right answers, each of its own images: arm - baseline.

    Too cautious for the same images, because both find the same ones hard. One right and one wrong answer is added to
    each, so that the error is never zero (Agresti and Caffo 2000). None for no images.
    """
    if arm_count < 1 or baseline_count < 1:
        return None
    one, other = (arm * arm_count + 1) / (arm_count + 2), (baseline * baseline_count + 1) / (baseline_count + 2)
    error = math.sqrt(one * (1 - one) / (arm_count + 2) + other * (1 - other) / (baseline_count + 2))
    return Effect(estimate=100 * (arm - baseline), centre=100 * (one - other), error=100 * error, bound=100)


def wilson(hits: int, of: int, *, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a share of right answers, as parts of 1 (Wilson 1927); all of it for no images."""
    if not of:
        return 0.0, 1.0
    interval = stats.binomtest(hits, of).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True, kw_only=True)
class Holm:
    """What Holm's procedure says of one test among several."""

    rejected: bool
    level: float
    """Confidence of the interval that belongs to it: it excludes no difference exactly if the test is rejected."""
    p_value: float
    """Adjusted: at most `alpha` exactly if the test is rejected."""


def holm(p_values: Sequence[float], alpha: float) -> list[Holm]:
    """Test all at once, so that the probability of any false alarm at all is at most `alpha` (Holm 1979).

    The k-th smallest of m p-values is compared with alpha / (m - k + 1), until the first one that exceeds it; that one
    and all larger ones are not rejected. The interval of a rejected test has the level 1 - alpha / (m - k + 1); all
    others have the level at which the procedure stopped, at which their intervals include no difference.
    """
    order = np.argsort(p_values, kind="stable")
    remaining = np.arange(len(order), 0, -1)
    adjusted = np.minimum(1, np.maximum.accumulate(np.take(p_values, order) * remaining))
    rejected = adjusted <= alpha
    levels = 1 - alpha / np.maximum(remaining, len(order) - rejected.sum())
    return [
        Holm(rejected=bool(rejected[rank]), level=float(levels[rank]), p_value=float(adjusted[rank]))
        for rank in np.argsort(order)
    ]


def trend(moments: Values, values: Values, *, parts: int = 10) -> Effect | None:
    """The slope of values over moments: least squares over the means of equal parts of the time, Student's t.

    Neighbouring values of memory or latency are alike, so that least squares over all of them gives intervals that are
    far too narrow. Simulated with 200 values without a trend, whose neighbours correlate by 0, 0.5 and 0.8: such
    intervals hold 0 in 96, 77 and 49 % of the cases, those of ten means in 95, 94 and 92 %. None if a part has no
    value.
    """
    times, found = np.asarray(moments, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(times) < parts:
        return None
    edges = np.linspace(times.min(), times.max(), parts + 1)
    places = np.clip(np.searchsorted(edges, times, side="right") - 1, 0, parts - 1)
    counts = np.bincount(places, minlength=parts)
    if not counts.all():
        return None
    means = [np.bincount(places, weights=each, minlength=parts) / counts for each in (times, found)]
    line = stats.linregress(*means)  # its error is NaN where all means are equal
    return Effect(centre=float(line.slope), error=float(np.nan_to_num(line.stderr)), df=parts - 2)


def percentile(samples: Values, rank: float, *, min_beyond: int = MIN_BEYOND) -> float | None:
    """The sample at the `rank`-th percentile (0 to 100), or the next one above; it may be infinite.

    None for no samples, and where fewer than `min_beyond` lie beyond it.
    """
    if not len(samples) or len(samples) * (100 - rank) / 100 < min_beyond - 1e-9:
        return None
    return float(np.percentile(np.asarray(samples, dtype=np.float64), rank, method="higher"))


def _mean(differences: npt.NDArray[np.float64], **kind: bool) -> Effect | None:
    """Student's t; None for fewer than five rounds."""
    if len(differences) < MIN_ROUNDS:
        return None
    centre, error = float(differences.mean()), float(stats.sem(differences))
    return Effect(centre=centre, error=error, df=len(differences) - 1, **kind)


def _logs(values: Values) -> npt.NDArray[np.float64] | None:
    array = np.asarray(values, dtype=np.float64)
    return np.log(array) if bool((array > 0).all()) and bool(np.isfinite(array).all()) else None
