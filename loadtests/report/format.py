"""Values, changes and token counts of a comparison as text."""

from typing import Any

from loadtests.report.rendering import UNKNOWN, number
from loadtests.report.verdicts import TOP1, Change, Metric, Row

_CLOSE_TO_1 = 0.005
"""An end of an interval that is closer to 1 needs a third decimal, or it would read 1.00."""


def signed(value: float) -> str:
    """The same with its sign, also where it is a plus."""
    text = number(value)
    return f"+{text}" if value > 0 else text


def tokens_text(info: dict[str, Any]) -> str:
    """`16 of 64`: on how many of its tokens a model attends; empty if that is unknown."""
    known = info.get("kv_tokens") and info.get("tokens")
    return f"{info['kv_tokens']} of {info['tokens']}" if known else ""


def value_text(metric: Metric, value: float | None) -> str:
    """A value alone, in the unit of its heading."""
    return f"{value:.2f}%" if metric == TOP1 and value is not None else number(value)


def range_text(row: Row) -> str:
    """The smallest and the largest block, once where they are the same."""
    ends = [value_text(row.metric, end) for end in (row.smallest, row.largest) if end is not None]
    return "–".join(dict.fromkeys(ends)) or UNKNOWN


def difference(metric: Metric, value: str) -> str:
    """The text of a difference with its unit: `+1.2 ms`."""
    return f"{value} {'points' if metric == TOP1 else metric.unit}"


def change_texts(metric: Metric, change: Change) -> tuple[str, str]:
    """The estimate and its interval: `×1.08` and `1.04–1.12`, or `+1.2 ms` and `+0.3 to +2.1`."""
    ends = (change.estimate, change.low, change.high)
    if metric.kind == "difference":
        estimate, low, high = map(signed, ends)
        return difference(metric, estimate), f"{low} to {high}"
    places = 3 if any(abs(end - 1) < _CLOSE_TO_1 for end in ends) else 2
    estimate, low, high = (f"{end:.{places}f}" for end in ends)
    return f"×{estimate}", f"{low}–{high}"
