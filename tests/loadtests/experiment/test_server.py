"""The server's own word about its time, and memory on devices that are not there."""

import os

from loadtests.experiment.server import Server, free_port, mean_stages_ms
from service.host import gpu_process_bytes


def test_means_are_of_what_came_between() -> None:
    before = {("queue", "sum"): 1.0, ("queue", "count"): 100.0, ("queue", "bucket"): 7.0}
    after = {("queue", "sum"): 1.5, ("queue", "count"): 150.0, ("queue", "bucket"): 9.0}
    after |= {("inference", "sum"): 0.2, ("inference", "count"): 40.0, ("idle", "sum"): 0.0, ("idle", "count"): 0.0}
    assert mean_stages_ms(before, after) == {"queue": 10.0, "inference": 5.0}
    assert mean_stages_ms(after, after) == {}


def test_a_server_without_metrics_tells_nothing() -> None:
    assert Server(f"http://127.0.0.1:{free_port()}", name="none").stage_totals() == {}


def test_no_gpu_is_no_memory_on_it() -> None:
    assert gpu_process_bytes([os.getpid()]) is None
