"""Facts about this machine and its processes: cores, CPU, memory, GPU memory, and the commit of this checkout.

`psutil` and `pynvml` are not dependencies of the service: only the functions that use them import them.
"""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1_QUOTA = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_CGROUP_V1_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")

_PROCESS = Path("/proc/self")
_MEMINFO = Path("/proc/meminfo")
_CPUINFO = Path("/proc/cpuinfo")
_VECTOR_EXTENSIONS = ("avx", "amx", "fma", "sse4")


def available_cores() -> int:
    """Whole cores that this process may use by affinity and cgroup quota, at least one."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, quota_cores() or affinity))


def quota_cores() -> int | None:
    """Cores' worth of CPU time that the container grants, rounded down; None without a limit."""
    try:
        if _CGROUP_V2.is_file():
            quota, period = _CGROUP_V2.read_text().split()
        elif _CGROUP_V1_QUOTA.is_file():
            quota, period = _CGROUP_V1_QUOTA.read_text(), _CGROUP_V1_PERIOD.read_text()
        else:
            return None
        return max(1, int(quota) // int(period)) if int(quota) > 0 else None
    except ValueError:  # "max": no limit
        return None


def cpu_model() -> str:
    """The processor's name, or its architecture where the system gives no name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_features() -> str:
    """The processor's name and its vector extensions, where the system lists them."""
    vector = [flag for flag in _cpuinfo().get("flags", "").split() if flag.startswith(_VECTOR_EXTENSIONS)]
    return f"{cpu_model()} ({' '.join(vector)})" if vector else cpu_model()


def bytes_saturate() -> bool:
    """Whether ONNX Runtime's 8-bit kernels may saturate: on an x86 processor known to have no VNNI."""
    # Only x86 processors have a field of this name.
    flags = _cpuinfo().get("flags", "")
    return bool(flags) and "vnni" not in flags


def _cpuinfo() -> dict[str, str]:
    """Fields of the last core that the system lists; empty where there is no list."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not report it."""
    return _memory("status", "VmRSS")


def peak_bytes() -> int:
    """Largest resident memory of this process since its start or `reset_peak`; 0 if it is not reported."""
    return _memory("status", "VmHWM")


def reset_peak() -> None:
    """Let `peak_bytes` start again from the present resident memory. Raises OSError where the system cannot."""
    (_PROCESS / "clear_refs").write_text("5", encoding="ascii")


def memory_left_bytes() -> int | None:
    """Memory that this process can still take: by its control groups, its own limits and what the machine has
    available, whichever is least. None where the system reports none of them."""
    limits = [*_cgroup_left(), *_process_left()]
    if available := _field(_MEMINFO, "MemAvailable"):
        limits.append(available)
    return max(0, min(limits)) if limits else None


def _cgroup_left() -> Iterator[int]:
    """What each control group above this process leaves, counting its page cache as free."""
    for group in _cgroups():
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                bound, taken = (group / limit).read_text(encoding="ascii"), (group / used).read_text(encoding="ascii")
                lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
            except OSError:  # no limit here, or the other version of control groups
                continue
            if bound.strip().isdecimal():  # "max": no limit
                reclaimable = sum(int(line.split()[1]) for line in lines if line.split()[0] == cache)
                yield int(bound) - int(taken) + reclaimable


def _cgroups() -> Iterator[Path]:
    try:
        lines = (_PROCESS / "cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            root = _CGROUPS / controllers
            # In a container the path may be the host's; then the root is the container's own group.
            own = root / path.strip("/")
            yield from [group for group in (own, *own.parents) if group == root or root in group.parents]


def _process_left() -> Iterator[int]:
    if sys.platform == "win32":
        return
    import resource  # noqa: PLC0415 (not on Windows)

    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft - _memory("status", used)


def data_bytes() -> int:
    """Private writable memory of this process, whether resident or not: what RLIMIT_DATA limits."""
    return _memory("status", "VmData")


def pss_bytes() -> int | None:
    """Proportional set size of this process; None where the system does not report it."""
    return _memory("smaps_rollup", "Pss") or None


def _memory(file: str, field: str) -> int:
    return _field(_PROCESS / file, field)


def _field(file: Path, field: str) -> int:
    """A field in kB of a file of the proc filesystem, in bytes; 0 where the system does not report it."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def process_tree(pid: int) -> list["psutil.Process"]:
    """A process and its descendants; empty if it has ended. Needs psutil."""
    import psutil  # noqa: PLC0415

    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def process_tree_bytes(pid: int) -> int:
    """Memory of a process and its descendants: PSS where the system reports it, else the memory unique to each (USS).

    Reading PSS costs some ten milliseconds per process. 0 if the process has ended. Needs psutil.
    """
    import psutil  # noqa: PLC0415

    total = 0
    for process in process_tree(pid):
        with suppress(psutil.Error):  # it has ended
            memory = process.memory_full_info()
            total += getattr(memory, "pss", 0) or memory.uss
    return total


def gpu_used_bytes(number: int) -> int:
    """Memory in use on one NVIDIA GPU by all processes. Raises pynvml.NVMLError without one. Needs nvidia-ml-py."""
    with _nvml() as nvml:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(number)).used)


def gpu_process_bytes(pids: Iterable[int]) -> int | None:
    """Memory that these processes hold on all NVIDIA GPUs; None without a GPU, or if they use none.

    NVML reports the host's process ids: in a container with process ids of its own, none of `pids` is found, and the
    answer is None. Needs nvidia-ml-py. Not yet run on a GPU.
    """
    from pynvml import NVMLError  # noqa: PLC0415

    wanted = set(pids)
    try:
        with _nvml() as nvml:
            handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
            running = [process for handle in handles for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    except NVMLError:
        return None
    used = [process.usedGpuMemory or 0 for process in running if process.pid in wanted]
    return sum(used) if used else None


@contextmanager
def _nvml() -> Iterator[Any]:
    import pynvml  # noqa: PLC0415

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def git(*arguments: str) -> str:
    """The output of a git command in this checkout. Raises OSError or subprocess.CalledProcessError."""
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)  # noqa: S603
    return done.stdout.strip()


def git_commit() -> str:
    """The commit of this checkout, with a digest of its changes if there are any; `unknown` outside of one."""
    try:
        commit, status = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain")
        if not status:
            return commit
        changes = status + git("diff", "HEAD")
        return f"{commit} and changes {hashlib.sha256(changes.encode()).hexdigest()[:8]}"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
