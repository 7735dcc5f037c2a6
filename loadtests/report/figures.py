"""Figures of a comparison as text: numbers with their units, changes with their intervals, the names of metrics."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from loadtests.experiment.model import HIGH, MODERATE, SATURATED, Comparison
from loadtests.report.verdicts import Change, Figure, Findings, Metric, Row, Verdict

SYMBOLS: dict[Verdict, str] = {"better": "✓", "worse": "✗", "no difference seen": "○"}
UNKNOWN = "–"
"""Stands for a figure that is not known, or that too few samples would carry."""
HEADLINE = ("top1", "throughput", "moderate_p50", "moderate_p99", "high_p50", "high_p99", "peak_bytes")
"""Keys of the metrics in the verdict table and the conclusion, in this order; the rest stands in the detail table."""
_TIGHT = 0.005
"""An end of an interval that is closer to 1 than this needs a third decimal, or it would read 1.00."""


def info_of(comparison: Comparison, label: str) -> dict[str, Any]:
    """What the service said of an arm's model; empty if it never answered."""
    return next((block.info for block in comparison.blocks if block.arm == label and block.info), {})


def headline(findings: Findings) -> list[Metric]:
    """The metrics of the verdict table, as far as they were compared."""
    by_key = {metric.key: metric for metric in findings.metrics}
    return [by_key[key] for key in HEADLINE if key in by_key]


def ordered(findings: Findings) -> list[Row]:
    """The rows with the A/A arm at the end."""
    return sorted(findings.rows, key=lambda row: row.arm.repeat_of is not None)


def load_name(comparison: Comparison, load: str) -> str:
    """A load as a reader knows it: `340/s`, or `saturation`."""
    if load in comparison.rates:
        # 170.0 a second is 170/s, 4.25 stays; never 1.7e+03.
        rate = comparison.rates[load]
        return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"
    return "saturation" if load == SATURATED else load


def metric_name(comparison: Comparison, metric: Metric) -> str:
    """As it stands in a sentence, without its unit."""
    for load in (MODERATE, HIGH):
        if metric.key.startswith(f"{load}_"):
            return f"{metric.key.removeprefix(load + '_')} at {load_name(comparison, load)}"
    fixed = {"throughput": "images/s at saturation", "peak_bytes": metric.name.removesuffix(" MB"), "top1": "top-1"}
    return fixed.get(metric.key, metric.name)


def number(value: float) -> str:
    """Three significant digits or more, without an exponent: 4.27, 12.4, 151, 1,395."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else UNKNOWN
    size = abs(value)
    places = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{value:,.{places}f}".replace("-", "−")


def scaled(metric: Metric, value: float) -> float:
    """In the unit in which a reader sees it: MB for bytes, % for shares."""
    return value / 1e6 if metric.key == "peak_bytes" else value * 100 if metric.key == "top1" else value


def value_text(metric: Metric, value: float | None) -> str:
    """A figure alone, in the unit of its heading."""
    if value is None:
        return UNKNOWN
    if math.isinf(value):
        return "∞"
    return f"{value:.2%}" if metric.key == "top1" else number(scaled(metric, value))


def range_text(metric: Metric, figure: Figure) -> str:
    """Smallest and largest block, once where they are the same; empty where there are none."""
    if figure.smallest is None or figure.largest is None:
        return ""
    ends = (value_text(metric, figure.smallest), value_text(metric, figure.largest))
    return "–".join(dict.fromkeys(ends))


def unit(metric: Metric) -> str:
    """Of a difference."""
    return {"peak_bytes": "MB", "top1": "points", "throughput": "images/s"}.get(metric.key, "ms")


def estimate_text(metric: Metric, change: Change) -> str:
    """`×1.08`, or `+1.2 ms`."""
    if metric.kind == "ratio":
        return f"×{ratio_text(change.estimate, change)}"
    return f"{_signed(scaled(metric, change.estimate))} {unit(metric)}"


def interval_text(metric: Metric, change: Change) -> str:
    """`1.04–1.12`, or `+0.3 to +2.1`."""
    if metric.kind == "ratio":
        return f"{ratio_text(change.low, change)}–{ratio_text(change.high, change)}"
    return f"{_signed(scaled(metric, change.low))} to {_signed(scaled(metric, change.high))}"


def ratio_text(value: float, change: Change) -> str:
    if not math.isfinite(value):
        return number(value)
    places = 3 if any(abs(end - 1) < _TIGHT for end in (change.estimate, change.low, change.high)) else 2
    return f"{value:.{places}f}"


def _signed(value: float) -> str:
    text = number(value)
    return text if value <= 0 or math.isnan(value) else f"+{text}"


def median(values: Iterable[float]) -> float | None:
    """None of nothing."""
    known = list(values)
    return float(np.median(known)) if known else None


def listed(items: list[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
