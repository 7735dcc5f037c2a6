"""From the samples of a load to what a fault did: counts, latencies before, during and after, and recovery."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from loadtests.faults.client import Outcome
from loadtests.faults.load import Sample
from loadtests.faults.plan import CUT, Bin, FaultResult, Moments
from loadtests.faults.service import End
from loadtests.generator.samples import LATE_MS
from loadtests.statistics import percentile

RECOVERED_SECONDS = 2.0
RECOVERED_FACTOR = 1.5
_LEAST_MS = 10.0
"""A p99 of at most this × `RECOVERED_FACTOR` counts as recovered: smaller differences are the machine's noise."""
_BIN_SECONDS = 0.5
_REAPED_SECONDS = 1.0
"""The end of a process is noticed at most this long after its connections break."""


def summarise(
    result: FaultResult,
    samples: Sequence[Sample],
    *,
    began_s: float,
    ended_s: float,
    after_s: float,
    ends: Sequence[End],
) -> dict[str, object]:
    """The fields of a result that follow from its load.

    The fault lasted from `began_s` to `ended_s`; requests that were due from `after_s` on count as after it.
    """
    counts = Counter(str(_outcome(sample, ends)) for sample in samples)
    failed = Counter(str(sample.status) for sample in samples if sample.outcome is Outcome.FAILED)
    before = [sample for sample in samples if sample.due_s < began_s]
    calm = moments(before)
    later = [sample for sample in samples if sample.due_s >= ended_s]
    return {
        **vars(result),
        "counts": {name: counts[name] for name in (*Outcome, CUT)},
        "statuses": dict(sorted(failed.items())),
        "before": calm,
        "during": moments([sample for sample in samples if began_s <= sample.due_s < ended_s]),
        "after": moments([sample for sample in samples if sample.due_s >= after_s]),
        "lasted_s": ended_s - began_s,
        "first_answer_s": _first_answer(samples, ends),
        "recovery_s": recovery(later, ended_s, calm.p99_ms),
        "exit_codes": tuple(end.code for end in ends),
        "late_arrivals": sum(sample.behind_ms > LATE_MS for sample in samples),
        "timeline": tuple(_timeline(samples, began_s)),
    }


def moments(samples: Sequence[Sample]) -> Moments:
    """Latencies of the answered requests."""
    answered = [sample.latency_ms for sample in samples if sample.outcome is Outcome.ANSWERED]
    return Moments(
        requests=len(samples),
        answered=len(answered),
        p50_ms=percentile(answered, 50),
        p99_ms=percentile(answered, 99, min_beyond=1),
    )


def recovery(samples: Sequence[Sample], ended_s: float, p99_ms: float | None) -> float | None:
    """Seconds from the end of a fault to recovery; None if there is none.

    Recovery begins with two seconds in which all requests due are answered, with a p99 of at most 1.5 times the one
    before the fault, or times 10 ms if that was shorter.
    """
    if p99_ms is None or not samples:
        return None
    limit = RECOVERED_FACTOR * max(p99_ms, _LEAST_MS)
    due = np.array([sample.due_s for sample in samples])
    latencies = np.array([s.latency_ms if s.outcome is Outcome.ANSWERED else math.inf for s in samples])
    order = np.argsort(due)
    due, latencies = due[order], latencies[order]
    for start in [ended_s, *due.tolist()]:
        if start + RECOVERED_SECONDS > due[-1]:
            return None
        window = latencies[(due >= start) & (due < start + RECOVERED_SECONDS)]
        # With a hundred requests or fewer in two seconds, p99 is the slowest of them.
        if len(window) and np.percentile(window, 99, method="lower") <= limit and np.isfinite(window).all():
            return float(start - ended_s)
    return None


def _outcome(sample: Sample, ends: Sequence[End]) -> str:
    """A lost request counts as cut if its process ended, or was ended, without being asked to by SIGTERM."""
    if sample.outcome is not Outcome.LOST:
        return sample.outcome
    broke_s = sample.due_s + sample.latency_ms / 1000
    cut = any(end.by != "SIGTERM" and sample.due_s <= end.at_s <= broke_s + _REAPED_SECONDS for end in ends)
    return CUT if cut else sample.outcome


def _first_answer(samples: Sequence[Sample], ends: Sequence[End]) -> float | None:
    if not ends:
        return None
    answered = [s.due_s for s in samples if s.outcome is Outcome.ANSWERED and s.due_s > ends[-1].at_s]
    return min(answered) - ends[-1].at_s if answered else None


def _timeline(samples: Sequence[Sample], began_s: float) -> list[Bin]:
    """All samples in bins of half a second."""
    bins: dict[int, list[Sample]] = {}
    for sample in samples:
        bins.setdefault(math.floor((sample.due_s - began_s) / _BIN_SECONDS), []).append(sample)
    return [_bin(number * _BIN_SECONDS, due) for number, due in sorted(bins.items())]


def _bin(at_s: float, due: Sequence[Sample]) -> Bin:
    answered = [sample.latency_ms for sample in due if sample.outcome is Outcome.ANSWERED]
    refused = sum(sample.outcome is Outcome.REFUSED for sample in due)
    return Bin(
        at_s=at_s,
        answered=len(answered),
        refused=refused,
        others=len(due) - len(answered) - refused,
        worst_ms=max(answered, default=None),
    )
