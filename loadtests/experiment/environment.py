"""Where and with what something was measured."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil

from service.host import cpu_model, git_commit

LOAD_AVERAGE = "load average before"
"""The fact that differs between two runs on the same machine; it tells whether the machine was quiet."""

_LIBRARIES = ("stridevit", "locust", "gevent", "geventhttpclient", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow")

_PREFIX = "STRIDEVIT_"
_NO_SETTINGS = ("STRIDEVIT_LOAD_", "STRIDEVIT_DATA", "STRIDEVIT_AGREEMENT", "STRIDEVIT_SERVICE_PYTHON")


def environment() -> dict[str, str]:
    """Facts by name: commit, CPU, memory, versions, and the service's settings in the environment."""
    return {
        "commit": git_commit(),
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
        **_versions(),
        **_settings(),
        LOAD_AVERAGE: f"{os.getloadavg()[0]:.2f}",
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _settings() -> dict[str, str]:
    """Settings in the environment reach every service that is started. Keys and paths are left out."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_PREFIX) and not name.startswith(_NO_SETTINGS) and "KEY" not in name and "/" not in value
    }
