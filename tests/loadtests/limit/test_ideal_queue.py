"""The ideal queue, against the formula for one lane and against a simulation in steps of time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.limit.ideal_queue import IdealQueue


def test_the_mean_wait_of_one_lane_is_that_of_pollaczek_and_khinchine() -> None:
    load, seconds = 0.7, 0.05
    due = np.cumsum(np.random.default_rng(1).exponential(seconds / load, 200_000))
    mean_ms = IdealQueue(lanes=1, seconds=seconds).latencies_ms(due).mean()
    wait = load * seconds / (2 * (1 - load))
    assert mean_ms == pytest.approx((seconds + wait) * 1000, rel=0.03)


@given(gaps=st.lists(st.integers(0, 5), min_size=1, max_size=40), lanes=st.integers(1, 4), seconds=st.integers(1, 6))
def test_it_agrees_with_a_simulation_step_by_step(gaps: list[int], lanes: int, seconds: int) -> None:
    due = np.cumsum(gaps)
    waiting, running, latencies, now = list(due), list[tuple[int, int]](), list[int](), 0
    while waiting or running:
        for end, since in [run for run in running if run[0] == now]:
            running.remove((end, since))
            latencies.append(end - since)
        while waiting and waiting[0] <= now and len(running) < lanes:
            running.append((now + seconds, waiting.pop(0)))
        now += 1
    assert IdealQueue(lanes=lanes, seconds=seconds).latencies_ms(due) == pytest.approx(np.array(latencies) * 1000)


def test_the_scatter_of_a_p99_shrinks_with_the_number_of_answers() -> None:
    queue = IdealQueue(lanes=2, seconds=0.08)
    assert queue.p99_scatter_ms(15, 100) is None, "too few for a p99"
    few, many = queue.p99_scatter_ms(15, 1000), queue.p99_scatter_ms(15, 8000)
    assert few
    assert many
    assert few[1] - few[0] > many[1] - many[0] > 0
    assert few[0] < many[0] < many[1] < few[1]
