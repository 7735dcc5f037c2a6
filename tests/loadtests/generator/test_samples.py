"""A window of samples, and histograms that add up."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.generator.histogram import Latencies
from loadtests.generator.load_result import LoadResult
from loadtests.generator.load_result import window as window_of
from loadtests.generator.samples import UNSENT, Sample, as_samples, read_samples


def sample(
    due_s: float, latency_ms: float, status: int = 200, correct: int | None = None, behind_ms: float = 0.25
) -> Sample:
    return Sample(due_s, latency_ms, status, behind_ms, model="m/1", image=3, correct=correct)


def window(samples: list[Sample], *, begin: float, seconds: float) -> LoadResult:
    return window_of(as_samples(samples), begin=begin, seconds=seconds, connections=None, traced=True)


def test_a_slow_server_s_throughput_and_slowest_answers_are_not_cut_off() -> None:
    # A closed loop of 16 users at exactly one second an answer: 16 images a second, whatever the window.
    samples = [sample(second + user / 16, 1000.0) for user in range(16) for second in range(12)]
    found = window(samples, begin=2.5, seconds=5)
    assert found.throughput == 16
    assert len(found.latencies_ms) == 80
    assert found.errors == 0


def test_failed_and_unsent_requests_stay_as_endless_latencies() -> None:
    samples = [sample(0, 1), sample(1, 5), sample(2, 5, status=429), sample(3, 0.1, status=UNSENT), sample(9, 1)]
    found = window(samples, begin=1, seconds=4)
    assert found.latencies_ms.tolist() == [5, np.inf, np.inf]
    assert found.trace is not None
    assert found.trace.due_s.tolist() == [0, 1, 2]
    assert found.trace.statuses.tolist() == [200, 429, UNSENT]
    assert found.trace.models.tolist() == ["m"] * 3
    assert (found.errors, found.unsent_arrivals, found.throughput) == (1, 1, 0.25)


def test_late_is_what_the_generator_sent_after_its_moment() -> None:
    punctual, late = sample(0, 1), sample(0, 1, behind_ms=5.5)
    found = window([punctual, late, late._replace(status=UNSENT)], begin=0, seconds=1)
    assert (found.late_arrivals, found.unsent_arrivals) == (1, 1)


def test_labelled_answers_are_counted() -> None:
    found = window([sample(0, 1, correct=1), sample(0, 1, correct=0), sample(0, 1)], begin=0, seconds=1)
    assert (found.labelled, found.correct) == (2, 1)


def test_samples_survive_their_file_and_a_cut_off_last_line_is_left_out(tmp_path: Path) -> None:
    kept = [sample(1795404587.747507, 13.814), sample(2, 0.5, status=0), sample(3, 1, correct=1)]
    path = tmp_path / "samples.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([Sample._fields, *kept])
    read = read_samples(path)
    assert [Sample(*row)._replace(correct=None) for row in read] == [row._replace(correct=None) for row in kept]
    assert read.correct.tolist() == pytest.approx([np.nan, np.nan, 1], nan_ok=True)
    path.write_text(path.read_text() + "17954045", encoding="utf-8")
    assert len(read_samples(path)) == len(kept)
    path.write_text("", encoding="utf-8")
    assert len(read_samples(path)) == len(read_samples(tmp_path / "none.csv")) == 0


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(0.01, 60_000), min_size=20, max_size=200),
    st.lists(st.floats(0.01, 60_000), min_size=20, max_size=200),
)
def test_merged_histograms_are_those_of_all_samples_together(first: list[float], second: list[float]) -> None:
    merged = Latencies()
    for latencies in (first, second):
        worker = Latencies()
        for latency in latencies:
            worker.add(latency, ok=True)
        merged.merge(worker.take())
        # What was taken is not taken again.
        merged.merge(worker.take())
    found = merged.as_dict()
    assert found["answered"] == len(first) + len(second)
    together = np.sort(first + second)
    for rank in (50, 90, 99):
        # HdrHistogram takes the nearest rank, to three digits.
        place = rank / 100 * len(together)
        low, high = together[max(0, int(place - 0.5) - 1)], together[min(len(together) - 1, int(place + 0.5))]
        assert low * 0.998 - 1e-3 <= found[f"p{rank}_ms"] <= high * 1.002 + 1e-3


def test_a_failed_request_is_slower_than_every_answered_one() -> None:
    latencies = Latencies()
    for number in range(1, 95):
        latencies.add(float(number), ok=True)
    for _ in range(6):
        latencies.add(0.1, ok=False)
    found = latencies.as_dict()
    assert (found["answered"], found["failed"]) == (94, 6)
    assert found["p50_ms"] == pytest.approx(50, rel=1e-3)
    assert found["p95_ms"] is None
    assert "p95 not answered" in latencies.summary()
