"""The device, and the processes that train one model together: a single one, or those that torchrun started."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from training.stopping import Stopped

T = TypeVar("T")


class PeerLost(Exception):
    """Another process has ended, or its machine cannot be reached; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all that train together."""

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

    def gather(self, value: T) -> list[T]:
        """Each process's `value`, in the order of their ranks, in all processes."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def decide(self, question: Callable[[], T]) -> T:
        """Call `question()` in the main process, and return or raise its outcome in all processes."""
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


def choose_device(name: str) -> torch.device:
    """The device called `name`; for `auto` a GPU if torch finds one. Raises ValueError if it does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= (gpus := torch.cuda.device_count()):
        raise ValueError(f"device {name} is unavailable, torch finds {gpus or 'no'} GPUs: use another --device")
    return device


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """The processes that torchrun started, each on the GPU of its local rank; without torchrun this process alone.

    Raises ValueError if a launcher other than torchrun started the processes, or if there are more of them than GPUs;
    PeerLost if another process ends before this one.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "WORLD_SIZE is set, but torchrun did not start this process: start it with torchrun, which srun or "
                "mpirun may start once per machine"
            )
        yield World(device=device)
        return
    if device.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"process {local} of this machine has no GPU, there are {gpus}: lower --nproc-per-node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield World(device=device, rank=dist.get_rank(), size=dist.get_world_size())
    except Stopped:
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        # Drop the location in gloo's code, and its advice.
        reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". ")[0]
        raise PeerLost(
            f"the connection to another process was lost ({reason}): see what ended that process or its machine, and "
            "start all again with --auto-resume, unless torchrun --max-restarts does"
        ) from error
    # After any other error the processes are out of step, and NCCL would wait for those that still compute.
    dist.destroy_process_group()


def _is_lost_peer(error: RuntimeError) -> bool:
    # Gloo has no exception of its own.
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
