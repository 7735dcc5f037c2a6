"""How many cores this process may use: affinity and cgroup quota, not the host's core count."""

import os
from pathlib import Path

_CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
_CGROUP_V1_QUOTA = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_CGROUP_V1_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def available_cores() -> int:
    """Whole cores that this process may use, at least one."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, _quota() or affinity))


def _quota() -> int | None:
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
