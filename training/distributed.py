"""The processes that train one model together: one, or those that torchrun started."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from training.stopping import Stopped

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
        total = values.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

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
    """The world that torchrun's environment describes, on the GPU of this process's local rank; else just us.

    Raises ValueError for processes that something else than torchrun started, and for more of them than GPUs.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "WORLD_SIZE is set, but torchrun did not start this process: start it with torchrun, which srun or "
                "mpirun may start once a machine"
            )
        yield World(device=device)
        return
    if device.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"process {local} of this machine has no GPU, there are {gpus}: lower --nproc-per-node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device=device, rank=dist.get_rank(), size=dist.get_world_size())
    except Stopped:
        dist.destroy_process_group()
        raise
    # After any other error the processes no longer act alike, and NCCL would wait for those that still compute.
    dist.destroy_process_group()
