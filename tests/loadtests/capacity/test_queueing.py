"""The exact M/D/c queue, against the formula for one server, the simulated queue, and what must hold of any queue."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.capacity.queueing import HIGHEST_LOAD, DeterministicQueue
from loadtests.limit.ideal_queue import IdealQueue

SERVERS = st.integers(1, 12)
LOADS = st.floats(0.01, 0.95)


@settings(deadline=None, max_examples=40)
@given(load=st.floats(0.001, HIGHEST_LOAD), seconds=st.floats(1e-4, 10))
def test_the_mean_wait_of_one_server_is_that_of_pollaczek_and_khinchine(load: float, seconds: float) -> None:
    found = DeterministicQueue(1, seconds, load / seconds).mean_wait_seconds
    assert found == pytest.approx(load * seconds / (2 * (1 - load)), rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(servers=SERVERS, load=LOADS)
def test_the_distribution_of_the_wait_has_the_mean_that_littles_law_gives(servers: int, load: float) -> None:
    queue = DeterministicQueue(servers, 1.0, load * servers)
    step, longest = 0.02, queue.wait_seconds(99.9999) + 1
    waits = np.arange(0, longest, step) + step / 2
    mean = step * sum(1 - queue.waits_at_most(float(wait)) for wait in waits)
    assert mean == pytest.approx(queue.mean_wait_seconds, rel=0.02, abs=1e-3)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (2, 0.7), (4, 0.8), (16, 0.9)])
def test_the_simulated_queue_waits_as_long(servers: int, load: float) -> None:
    queue = DeterministicQueue(servers, 1.0, load * servers)
    due = np.cumsum(np.random.default_rng(3).exponential(1 / queue.rate, 100_000))
    waits = IdealQueue(lanes=servers, seconds=1.0).latencies_ms(due) / 1000 - 1
    # Neighbouring waits are alike, so that 100,000 of them say little of a tail; the seed makes it the same each time.
    assert waits.mean() == pytest.approx(queue.mean_wait_seconds, rel=0.1)
    assert np.percentile(waits, 99) == pytest.approx(queue.wait_seconds(99), rel=0.15)
    assert (waits < 1e-9).mean() == pytest.approx(queue.waits_at_most(0.0), abs=0.02)


@settings(deadline=None, max_examples=40)
@given(servers=SERVERS, loads=st.tuples(LOADS, LOADS), percentile=st.floats(1, 99.9))
def test_more_arrivals_wait_no_shorter(servers: int, loads: tuple[float, float], percentile: float) -> None:
    fewer, more = (DeterministicQueue(servers, 1.0, load * servers) for load in sorted(loads))
    assert fewer.wait_seconds(percentile) <= more.wait_seconds(percentile) + 1e-6


@settings(deadline=None, max_examples=40)
@given(servers=SERVERS, load=LOADS, percentile=st.floats(1, 99.9))
def test_one_queue_waits_no_longer_than_two_of_half_the_servers(servers: int, load: float, percentile: float) -> None:
    half = DeterministicQueue(servers, 1.0, load * servers)
    whole = DeterministicQueue(2 * servers, 1.0, 2 * load * servers)
    assert whole.wait_seconds(percentile) <= half.wait_seconds(percentile) + 1e-6


@settings(deadline=None, max_examples=40)
@given(servers=SERVERS, load=LOADS, waits=st.tuples(st.floats(0, 20), st.floats(0, 20)))
def test_the_distribution_rises_to_one(servers: int, load: float, waits: tuple[float, float]) -> None:
    queue = DeterministicQueue(servers, 1.0, load * servers)
    shorter, longer = (queue.waits_at_most(wait) for wait in sorted(waits))
    assert 0 < shorter <= longer + 1e-9 <= 1 + 1e-9
    assert queue.waits_at_most(-0.1) == 0


@pytest.mark.parametrize(("servers", "rate"), [(0, 1.0), (1, 0.0), (1, 0.99), (2, 2.5)])
def test_a_queue_that_has_no_end_is_refused(servers: int, rate: float) -> None:
    with pytest.raises((ValueError, ZeroDivisionError)):
        DeterministicQueue(servers, 1.0, rate)
