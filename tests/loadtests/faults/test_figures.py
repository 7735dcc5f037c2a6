"""From samples to what a fault did."""

from collections.abc import Iterable

import pytest

from loadtests.faults.client import Outcome
from loadtests.faults.figures import moments, recovery, summarise
from loadtests.faults.load import Sample
from loadtests.faults.plan import CUT, FaultResult
from loadtests.faults.service import End


def sample(due_s: float, latency_ms: float = 5.0, outcome: Outcome = Outcome.ANSWERED, status: int = 200) -> Sample:
    return Sample(due_s, latency_ms, 0.0, outcome, status, "v1", False)


def steady(begin: float, end: float, latency_ms: float = 5.0) -> list[Sample]:
    """Fifty a second."""
    return [sample(begin + number / 50, latency_ms) for number in range(round((end - begin) * 50))]


def result(samples: Iterable[Sample], *ends: End, survives: bool = True) -> FaultResult:
    """Of a fault from second 10 to 12, whose service was ready again at 13."""
    begun = FaultResult(fault="f", what="w", survives=survives)
    fields = summarise(begun, list(samples), began_s=10, ended_s=12, after_s=13, ends=ends)
    return FaultResult(**fields)  # type: ignore[arg-type]


def test_latencies_are_told_apart_by_when_requests_were_due() -> None:
    found = result([*steady(0, 10), *steady(10, 12, 50), *steady(12, 13, 70), *steady(13, 20, 8)])
    assert (found.before, found.during, found.after) == (
        moments(steady(0, 10)),
        moments(steady(10, 12, 50)),
        moments(steady(13, 20, 8)),
    )
    assert found.during
    assert (found.during.requests, found.during.p50_ms, found.during.p99_ms) == (100, 50, 50)
    assert found.sent == found.counts["answered"] == 1000
    assert found.broken == []


def test_recovery_begins_with_two_seconds_in_which_all_is_answered_as_before() -> None:
    slow = steady(12, 15, 400)
    assert recovery([*slow, *steady(15, 25)], 12, 5.0) == pytest.approx(3.0, abs=0.021)
    refused = [sample(16.01, outcome=Outcome.REFUSED, status=429)]
    assert recovery([*slow, *refused, *steady(15, 25)], 12, 5.0) == pytest.approx(4.02, abs=0.021)
    assert recovery(steady(12, 25), 12, 5.0) == 0.0
    assert recovery(steady(12, 25, 400), 12, 5.0) is None
    assert recovery(steady(12, 13), 12, 5.0) is None
    assert recovery(steady(12, 25), 12, None) is None


def test_a_little_slower_than_a_fast_service_is_recovered() -> None:
    assert recovery(steady(12, 25, 14), 12, 2.0) == 0.0
    assert recovery(steady(12, 25, 16), 12, 2.0) is None


def test_a_request_is_cut_only_if_its_process_ended_unasked_meanwhile() -> None:
    lost = sample(10.0, 500, Outcome.LOST, 0)
    killed, asked = End(at_s=10.6, code=-9, by="SIGKILL"), End(at_s=10.6, code=0, by="SIGTERM")
    earlier, later = End(at_s=9.0, code=-9, by=None), End(at_s=14.0, code=-9, by=None)
    for ends, name in (((killed,), CUT), ((asked,), "lost"), ((earlier, later), "lost"), ((), "lost")):
        assert result([*steady(0, 10), lost], *ends).counts[name] == 1


def test_what_breaks_a_promise_is_named() -> None:
    bad = [sample(10.5, outcome=Outcome.LOST, status=0), sample(10.6, outcome=Outcome.SWAPPED)]
    assert result([*steady(0, 10), *bad]).broken == ["1 answers to another image", "1 requests lost"]
    ended = End(at_s=11.0, code=-6, by=None)
    assert result(steady(0, 10), ended).broken == ["the process ended with -6"]
    # A fault that ends the process may cost requests, but never swaps answers.
    assert result([*steady(0, 10), *bad], ended, survives=False).broken == ["1 answers to another image"]


def test_where_only_the_guilty_may_fail_the_failures_of_others_are_named() -> None:
    failed = [*steady(0, 10), sample(10.5, outcome=Outcome.FAILED, status=500)]
    assert result(failed).broken == []
    spared = FaultResult(**{**vars(result(failed)), "spares_others": True})
    assert spared.broken == ["1 innocent requests failed"]


def test_the_first_answer_counts_from_the_end_of_the_process() -> None:
    ended = End(at_s=11.0, code=0, by="SIGTERM")
    assert result([*steady(0, 10), sample(12.5)], ended, survives=False).first_answer_s == pytest.approx(1.5)
    assert result(steady(0, 10)).first_answer_s is None


def test_the_timeline_begins_with_the_fault() -> None:
    failed = sample(10.2, outcome=Outcome.FAILED, status=500)
    found = result([sample(9.9, 7), sample(10.1, 9), failed, sample(10.3, outcome=Outcome.REFUSED, status=429)])
    assert [(each.at_s, each.answered, each.refused, each.others, each.worst_ms) for each in found.timeline] == [
        (-0.5, 1, 0, 0, 7),
        (0.0, 1, 1, 1, 9),
    ]
    assert found.statuses == {"500": 1}
