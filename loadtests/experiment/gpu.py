"""Memory of a process tree on NVIDIA GPUs, through NVML. Not run on a GPU yet.

NVML names processes as the host numbers them: in a container with process numbers of its own none of ours is found,
and then nothing is reported rather than everybody's memory.
"""

from collections.abc import Iterable

import pynvml


def device_bytes(pids: Iterable[int]) -> int | None:
    """What these processes hold on all GPUs together; None where there is no GPU, or they use none."""
    wanted = set(pids)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        used = [
            process.usedGpuMemory or 0
            for number in range(pynvml.nvmlDeviceGetCount())
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(number))
            if process.pid in wanted
        ]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return sum(used) if used else None
