"""The measurement behind the warning that bfloat16 is emulated."""

import torch

from training.bf16 import bf16_is_emulated, bf16_slowdown


def test_a_gpu_is_not_measured() -> None:
    assert bf16_slowdown(torch.device("cuda")) == 0
    assert not bf16_is_emulated(torch.device("cuda"))


def test_a_cpu_is_measured_once() -> None:
    cpu = torch.device("cpu")
    assert bf16_slowdown(cpu) > 0
    assert bf16_slowdown(cpu) is bf16_slowdown(cpu)
