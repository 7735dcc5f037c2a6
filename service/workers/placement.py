"""How many workers there are, and which cores or which GPU each of them has."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Final

from service.errors import StartupError
from service.host import quota_cores

CORES_OF_A_WORKER: Final = 4
"""Cores for which `auto` starts one worker on the CPU: docs/workers.md has the measurement behind it."""

_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The resources to share."""

    cores: tuple[int, ...]
    """Numbers of the cores that this process may use; neighbours share a core, a cache or a socket."""
    quota: int | None
    """CPU time that the container grants, in cores; None without a limit."""
    gpus: int

    @property
    def usable(self) -> int:
        """Cores that can be busy at once."""
        return max(1, min(len(self.cores), self.quota or len(self.cores)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a worker runs."""

    number: int
    cores: tuple[int, ...]
    """The only ones that it may use; empty: all."""
    threads: int
    device: str
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        where = "" if self.device in ("auto", "cpu") else f"{self.device}, "
        if self.cores:
            return f"{where}cores {','.join(map(str, self.cores))}"
        return f"{where}{self.threads} {'core' if self.threads == 1 else 'cores'}, not pinned"


def this_machine() -> Machine:
    """The machine as this process may use it."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Machine(cores=tuple(sorted(cores, key=_neighbourhood)), quota=quota_cores(), gpus=_gpus())


def places(asked: str, machine: Machine, *, device: str, threads: int) -> list[Place]:
    """The places of the workers. `asked`, `device` and `threads` as in the settings. Raises StartupError."""
    kind, _, number = device.partition(":")
    on_gpus = kind in ("cuda", "tensorrt") or (kind == "auto" and machine.gpus > 0)
    usable = min(machine.usable, threads or machine.usable)
    if on_gpus:
        count = _gpu_workers(asked, machine, kind=kind, number=number)
        kind = "cuda" if kind == "auto" else kind
    else:
        count = max(1, usable // CORES_OF_A_WORKER) if asked == "auto" else int(asked)
        kind = device
    # Within a quota, or with fewer threads than cores, the system chooses which cores are used.
    pinned = usable == len(machine.cores)
    return [
        Place(
            number=at,
            cores=share if pinned else (),
            threads=len(share),
            device=f"cuda:{number or at}" if kind == "cuda" else kind,
            environment={"CUDA_VISIBLE_DEVICES": _visible(at)} if kind == "tensorrt" else {},
        )
        for at, share in enumerate(_shares(machine.cores[:usable], count))
    ]


def _gpu_workers(asked: str, machine: Machine, *, kind: str, number: str) -> int:
    if number:
        if asked not in ("0", "1", "auto"):
            raise StartupError(
                f"--device {kind}:{number} names one GPU, and --workers {asked} needs {asked}: use --device {kind}, "
                "which gives each worker a GPU of its own, or --workers 1"
            )
        return 1
    if not machine.gpus:
        raise StartupError(f"--device {kind}: no GPU is found here: use --device cpu")
    if asked == "auto":
        return machine.gpus
    if int(asked) > machine.gpus:
        have = "1 GPU" if machine.gpus == 1 else f"{machine.gpus} GPUs"
        raise StartupError(
            f"--workers {asked}: there {'is' if machine.gpus == 1 else 'are'} {have}, and each worker needs one of its "
            f"own: use --workers {machine.gpus} or auto"
        )
    return int(asked)


def _shares(cores: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """The cores in `count` groups of neighbours, as even as possible; with fewer cores than groups they share."""
    if count >= len(cores):
        return [(cores[at % len(cores)],) for at in range(count)]
    least, more = divmod(len(cores), count)
    shares, begin = [], 0
    for at in range(count):
        end = begin + least + (at < more)
        shares.append(tuple(cores[begin:end]))
        begin = end
    return shares


def _neighbourhood(core: int) -> tuple[int, int, int, int]:
    """Sorts cores that share a socket, a last-level cache or a physical core next to each other."""
    folder = _CPUS / f"cpu{core}"
    return (
        _number(folder / "topology/physical_package_id"),
        _number(folder / "cache/index3/id"),
        _number(folder / "topology/core_id"),
        core,
    )


def _number(file: Path) -> int:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _gpus() -> int:
    """NVIDIA GPUs that ONNX Runtime may use; 0 without its build for them. Not run on several GPUs yet."""
    try:
        metadata.distribution("onnxruntime-gpu")
        import pynvml  # noqa: PLC0415 (only in the extra `gpu`)
    except (metadata.PackageNotFoundError, ImportError):
        return 0
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return 0
    return count


def _visible(number: int) -> str:
    """The GPU of a number as CUDA_VISIBLE_DEVICES names it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[number] if visible else str(number)
