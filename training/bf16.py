"""Whether bfloat16 products save time: a CPU without instructions for them computes them tens of times slower."""

import time
from functools import lru_cache

import torch

_EMULATED = 3.0
"""A larger slowdown means emulation: with instructions for it, bfloat16 is faster than float32."""


def bf16_is_emulated(device: torch.device) -> bool:
    """Whether `device` is a CPU without instructions for bfloat16."""
    return bf16_slowdown(device) > _EMULATED


@lru_cache
def bf16_slowdown(device: torch.device) -> float:
    """Time of a bfloat16 product ÷ that of the same product in float32, measured in 0.1 s or so; 0 for a GPU."""
    if device.type != "cpu":
        return 0.0
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The fastest of three products on one thread, after one that is not timed.

    On a busy machine several threads wait for each other, which takes far longer than the product itself.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _fastest(dtype)
    finally:
        torch.set_num_threads(threads)


def _fastest(dtype: torch.dtype) -> float:
    left, right = torch.ones(256, 128, dtype=dtype), torch.ones(128, 128, dtype=dtype)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - started)
    return min(times[1:])
