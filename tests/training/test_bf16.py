"""The measurement behind the warning that bfloat16 is emulated."""

import pytest
import torch

from training.bf16 import bf16_is_emulated, bf16_slowdown


def test_a_gpu_is_not_measured() -> None:
    assert bf16_slowdown(torch.device("cuda")) == 0
    assert not bf16_is_emulated(torch.device("cuda"))


def test_a_cpu_is_measured_once() -> None:
    cpu = torch.device("cpu")
    assert bf16_slowdown(cpu) > 0
    assert bf16_slowdown(cpu) is bf16_slowdown(cpu)


def test_products_are_timed_on_one_thread_and_the_number_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        threads.append(torch.get_num_threads())
        return left @ right

    monkeypatch.setattr(torch, "mm", product)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert bf16_slowdown.__wrapped__(torch.device("cpu")) > 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {1}
