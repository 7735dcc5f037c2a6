"""The engine timer, on a clock that the runs themselves move."""

from collections.abc import Callable

import pytest

from service.engine_timer import time_runs


class Runs:
    """Work whose runs take the given seconds, one after the other."""

    def __init__(self, *seconds: float) -> None:
        self.now = 0.0
        self.count = 0
        self._seconds = seconds

    def __call__(self) -> None:
        self.now += self._seconds[self.count]
        self.count += 1

    def clock(self) -> float:
        return self.now


def test_runs_are_timed_until_they_reach_the_seconds() -> None:
    runs = Runs(9, 1, 2, 3, 4)
    assert time_runs(runs, seconds=5, clock=runs.clock) == [1, 2, 3]


def test_no_more_than_max_runs_are_timed() -> None:
    runs = Runs(9, 1, 2, 3, 4)
    assert time_runs(runs, seconds=100, max_runs=2, clock=runs.clock) == [1, 2]


@pytest.mark.parametrize("warm_up_runs", [0, 1, 3])
def test_warm_up_runs_are_not_timed_and_one_run_always_is(warm_up_runs: int) -> None:
    runs = Runs(*[9] * warm_up_runs, 1)
    assert time_runs(runs, seconds=0, warm_up_runs=warm_up_runs, clock=runs.clock) == [1]
    assert runs.count == warm_up_runs + 1


def test_each_run_is_one_call_on_the_engine_thread_whose_wait_is_not_counted() -> None:
    runs = Runs(9, 1, 2)
    calls: list[float] = []

    def on_thread(timed: Callable[[], float]) -> float:
        runs.now += 100
        calls.append(timed())
        return calls[-1]

    assert time_runs(runs, seconds=3, on_thread=on_thread, clock=runs.clock) == [1, 2]
    assert calls == [9, 1, 2]
