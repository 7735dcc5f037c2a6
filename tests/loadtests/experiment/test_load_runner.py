"""What a load reads of its server meanwhile."""

import os
import time

import pytest

from loadtests.experiment.load_runner import Meter
from loadtests.experiment.server import Server


def test_cpu_of_parts_is_read_apart_from_that_of_the_whole() -> None:
    server = Server("http://127.0.0.1:1", name="this test")
    server.parts = {"front": time.process_time, "twice": lambda: 2 * time.process_time()}
    meter = Meter(server, os.getpid())
    begin, used = time.time(), time.process_time()
    meter.read()
    while time.process_time() < used + 0.5 or time.time() < begin + 0.2:
        sum(range(10_000))
    meter.read()
    seconds = time.time() - begin
    _, generator = meter.cores(begin, seconds)
    parts = meter.part_cores(begin, seconds)
    assert generator > 0
    assert parts["front"] == pytest.approx(generator, rel=0.2)
    assert parts["twice"] == pytest.approx(2 * generator, rel=0.2)


def test_without_a_reading_nothing_is_known() -> None:
    meter = Meter(Server("http://127.0.0.1:1", name="this test"), os.getpid())
    assert meter.cores(0, 1) == (0, 0)
    assert meter.part_cores(0, 1) == {}
