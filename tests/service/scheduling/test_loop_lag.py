"""How late the event loop is, on an injected clock."""

import asyncio

import pytest

from service.scheduling.loop_lag import LoopLag
from tests.service.conftest import Clock, until


def test_a_loop_that_is_busy_is_late_already_and_afterwards_and_then_recovers() -> None:
    clock = Clock()
    lag = LoopLag(clock)

    async def scenario() -> None:
        lag.start()
        try:
            assert lag.seconds <= 0
            clock.now += 0.52
            assert lag.seconds == pytest.approx(0.5), "the timer is due, and has not been called"
            # Called by hand, so that it cannot fire again before the check.
            assert lag._timer
            lag._timer.cancel()
            lag._tick()
            assert lag.seconds == pytest.approx(0.5)
            await until(lambda: lag.seconds < 0.01)
            assert lag.worst_seconds == pytest.approx(0.5)
        finally:
            lag.stop()
        assert lag.seconds == 0

    asyncio.run(asyncio.wait_for(scenario(), 300))


def test_the_worst_lag_is_that_of_the_last_seconds() -> None:
    clock = Clock()
    lag = LoopLag(clock)
    lag.observe(0.5, clock.now)
    for _ in range(4):
        clock.now += 16
        lag.observe(0.0, clock.now)
    assert lag.worst_seconds < 0.1


def test_a_pause_of_the_whole_process_counts_as_one_long_turn() -> None:
    clock = Clock()
    lag = LoopLag(clock)

    async def scenario() -> None:
        lag.start()
        try:
            clock.now += 3600
            assert lag.seconds == pytest.approx(1.0), "before the timer is called"
            await until(lambda: lag._due > clock.now)
            assert lag.seconds <= 1.0
            assert lag.worst_seconds == pytest.approx(1.0)
        finally:
            lag.stop()

    asyncio.run(asyncio.wait_for(scenario(), 300))
