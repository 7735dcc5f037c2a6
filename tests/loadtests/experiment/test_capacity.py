"""The largest rate that keeps an objective, against servers that are formulas."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.experiment.capacity import MOST_SECONDS, find_capacity
from loadtests.experiment.model import CapacitySearch, ComparisonPlan
from tests.loadtests.experiment.benches import comparison_plan


def p99(**changes: Any) -> ComparisonPlan:
    return comparison_plan(**{"objective_ms": 50.0, "seconds": 1.0, **changes})


def search(capacity: float, *, saturated: float, percentile: float = 99) -> CapacitySearch:
    """Of a server that answers in 10 ms up to its capacity, and in 100 ms beyond it."""

    def probe(rate: float, _: float, __: int) -> npt.NDArray[np.float64]:
        return np.full(1000, 10.0 if rate <= capacity else 100.0)

    return find_capacity(p99(objective_percentile=percentile), "m", 0, saturated=saturated, probe=probe)


@settings(deadline=None)
@given(st.floats(0.23, 1.09))
def test_the_rate_kept_it_and_little_more_would_not(share: float) -> None:
    found = search(share * 500, saturated=500)
    assert found.rate is not None
    step = 0.9 * 500 / 2**5
    assert share * 500 - step - 1e-6 <= found.rate <= share * 500
    assert len(found.probes) == 5
    assert {latency for _, latency in found.probes} <= {10, 100}


def test_a_server_that_never_keeps_it_has_the_rate_nothing() -> None:
    found = search(1, saturated=500)
    assert (found.rate, found.reason) == (0, None)


def test_where_a_percentile_cannot_be_seen_the_reason_is_given() -> None:
    slow = search(4, saturated=5)
    # The first rate is high enough to see it, a lower one is not: nothing is decided by too few.
    lower = search(1, saturated=13.5)
    assert (lower.rate, len(lower.probes)) == (None, 1)
    assert slow.rate is None
    assert slow.reason is not None
    assert "--objective-percentile" in slow.reason
    assert search(4, saturated=5, percentile=95).rate is not None
    assert search(4, saturated=0).reason == "nothing was answered at saturation"


def test_a_probe_is_long_enough_for_its_percentile() -> None:
    lengths: list[tuple[float, float]] = []

    def probe(rate: float, seconds: float, _: int) -> npt.NDArray[np.float64]:
        lengths.append((rate, seconds))
        return np.array([1.0])

    find_capacity(p99(seconds=2.0), "m", 0, saturated=100, probe=probe)
    for rate, seconds in lengths:
        assert rate * seconds >= 499
        assert 2 <= seconds <= MOST_SECONDS


@pytest.mark.parametrize(
    ("latencies", "kept", "reached"),
    [
        ([10.0] * 1000, True, 10.0),
        ([10.0] * 989 + [np.inf] * 11, False, None),
        ([], False, None),
        ([10.0] * 98 + [60.0] * 2, False, 60.0),
    ],
)
def test_unanswered_requests_break_the_objective(latencies: list[float], kept: bool, reached: float | None) -> None:
    found = find_capacity(p99(), "m", 0, saturated=100, probe=lambda *_: np.array(latencies))
    assert {latency for _, latency in found.probes} == {reached}
    assert (found.rate != 0) == kept
