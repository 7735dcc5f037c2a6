"""Where and on what something was measured."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

_LIBRARIES = ("stridevit", "locust", "gevent", "geventhttpclient", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow")

_PREFIX = "STRIDEVIT_"
_NO_SETTINGS = ("STRIDEVIT_LOAD_", "STRIDEVIT_DATA", "STRIDEVIT_AGREEMENT", "STRIDEVIT_SERVICE_PYTHON")


def environment() -> dict[str, str]:
    """By name; the load average tells whether the machine was quiet."""
    return {
        "commit": commit(),
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
        **_versions(),
        **_settings(),
        "load average before": f"{os.getloadavg()[0]:.2f}",
    }


def commit() -> str:
    """Of the checkout that this code is in, and a digest of its changes; `unknown` outside of one."""
    try:
        short, status = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain")
        if not status:
            return short
        changes = status + git("diff", "HEAD")
        return f"{short} and changes {hashlib.sha256(changes.encode()).hexdigest()[:8]}"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*arguments: str) -> str:
    """What git says in this checkout. Raises OSError or CalledProcessError."""
    ended = subprocess.run(  # noqa: S603 (our own command)
        ["git", *arguments],  # noqa: S607
        cwd=Path(__file__).parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return ended.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _settings() -> dict[str, str]:
    """The service's settings in the environment, which every service that is started takes over; no keys, no paths."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_PREFIX) and not name.startswith(_NO_SETTINGS) and "KEY" not in name and "/" not in value
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
