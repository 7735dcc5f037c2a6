"""The processes that train one model together: one, or those that torchrun started."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all of them."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def decide(self, question: Callable[[], T]) -> T:
        """What the main process answers, or raises, in each process."""
        if self.size == 1:
            return question()
        answer: list[Any] = [None, None]
        if self.main:
            try:
                answer[0] = question()
            except Exception as error:  # noqa: BLE001 (raised below, in every process)
                answer[1] = error
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return cast(T, answer[0])


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """The world that torchrun's environment describes, on the GPU of this process's local rank; else just us."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield World(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device=device, rank=dist.get_rank(), size=dist.get_world_size())
    finally:
        dist.destroy_process_group()
