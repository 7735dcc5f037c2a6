"""What a comparison shows, as values and as text: each metric of each arm, and its change against the baseline's."""

from dataclasses import dataclass, field
from typing import Literal

from loadtests.experiment.model import HIGH, MODERATE, SATURATED
from loadtests.report.rendering import UNKNOWN, number
from loadtests.statistics import Effect

_CLOSE_TO_1 = 0.005
"""An end of an interval that is closer to 1 needs a third decimal, or it would read 1.00."""

Verdict = Literal["better", "worse", "no difference seen"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A quantity that is compared."""

    name: str
    """For results.json; ends with the unit."""
    label: str = field(compare=False)
    """In words, without its unit: `p99 at 340/s`."""
    unit: str = ""
    load: str | None = None
    """The load under which it is measured; None for top-1, and for memory, whose peak is that of all loads."""
    rank: int | None = None
    """The percentile, for latencies."""
    better: Literal["higher", "lower"] = "lower"
    kind: Literal["ratio", "difference"] = "difference"
    """How two arms are compared."""

    @property
    def heading(self) -> str:
        """In words, with its unit: `p99 at 340/s, ms`."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, value: float | None) -> str:
        """A value, in the unit of the heading."""
        return f"{value:.2f}%" if self == TOP1 and value is not None else number(value)

    def difference(self, text: str) -> str:
        """The text of a difference, with its unit: `+1.2 ms`."""
        return f"{text} {'points' if self == TOP1 else self.unit}"


TOP1 = Metric(name="top1_percent", label="top-1", unit="%", better="higher")
THROUGHPUT = Metric(
    name="images_per_second", label="images/s at saturation", load=SATURATED, better="higher", kind="ratio"
)
LATENCIES = tuple(
    Metric(name=f"p{rank}_ms", label=f"p{rank}", unit="ms", load=load, rank=rank)
    for load in (MODERATE, HIGH)
    for rank in (50, 95, 99)
)
MEMORY = Metric(name="peak_mb", label="peak memory", unit="MB", kind="ratio")
GPU_MEMORY = Metric(name="peak_gpu_mb", label="peak GPU memory", unit="MB", kind="ratio")


@dataclass(frozen=True)
class Change:
    """One arm's metric against the baseline's."""

    estimate: float
    """A ratio (arm / baseline), or a difference (arm - baseline) in the metric's unit; of top-1, in points."""
    low: float
    high: float
    """Ends of the interval at `level`."""
    level: float
    """Confidence; above 0.95, because all comparisons of the report share its 5 %."""
    p_value: float
    """Adjusted (Holm) for all comparisons of the report: below 0.05 where a difference is seen."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of one arm."""

    arm: str
    """Its label."""
    metric: Metric
    value: float | None
    """None if it is unknown, or has too few samples. Infinite: that percentile of the requests was not answered."""
    base: float | None = None
    """The value that it is compared with: the baseline's, or an earlier one."""
    smallest: float | None = None
    """The smallest and the largest value of a block."""
    largest: float | None = None
    change: Change | None = None
    """Against `base`; None for the baseline, and where there are too few blocks for an interval."""

    @property
    def ends(self) -> tuple[float, float]:
        """Ends of a whisker: the smallest and the largest block, or the value where they are unknown."""
        value = self.value or 0.0
        return value if self.smallest is None else self.smallest, value if self.largest is None else self.largest

    @property
    def verdict(self) -> Verdict | None:
        """The verdict on the change; None without one."""
        return self.change.verdict if self.change else None

    @property
    def span(self) -> str:
        """The smallest and the largest block as text, only once if they are the same."""
        ends = [self.metric.text(end) for end in (self.smallest, self.largest) if end is not None]
        return "–".join(dict.fromkeys(ends)) or UNKNOWN

    @property
    def change_texts(self) -> tuple[str, str]:
        """The change and its interval: `×1.08` and `1.04–1.12`, or `+1.2 ms` and `+0.3 to +2.1`."""
        if self.change is None:
            return UNKNOWN, UNKNOWN
        ends = (self.change.estimate, self.change.low, self.change.high)
        if self.metric.kind == "difference":
            estimate, low, high = (f"+{number(end)}" if end > 0 else number(end) for end in ends)
            return self.metric.difference(estimate), f"{low} to {high}"
        places = 3 if any(abs(end - 1) < _CLOSE_TO_1 for end in ends) else 2
        estimate, low, high = (f"{end:.{places}f}" for end in ends)
        return f"×{estimate}", f"{low}–{high}"


Tested = tuple[Row, Effect | None]
"""A row without its change, and the effect to be judged; None where there is nothing to compare with."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """One row for each metric and arm, metric by metric."""

    rows: list[Row]

    @property
    def metrics(self) -> list[Metric]:
        """Those that were measured."""
        return list(dict.fromkeys(row.metric for row in self.rows))

    @property
    def memory(self) -> Metric:
        """`GPU_MEMORY` if it was measured in every block, else `MEMORY`."""
        return self.metrics[-1]

    @property
    def headline(self) -> list[Metric]:
        """The metrics of the verdict table and the conclusion."""
        return [metric for metric in self.metrics if metric.rank != 95]

    def row(self, arm: str, metric: Metric) -> Row | None:
        """A metric of one arm, by its label."""
        return next((row for row in self.rows if (row.arm, row.metric) == (arm, metric)), None)

    def value(self, arm: str, metric: Metric) -> float | None:
        """The value of a metric of one arm."""
        row = self.row(arm, metric)
        return row.value if row else None
