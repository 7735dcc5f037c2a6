"""Where and with what something was measured."""

import os
import platform
import shlex
import sys
from importlib.metadata import distributions
from pathlib import Path

import psutil

from service.host import cpu_model, git_commit

LOAD_AVERAGE = "load average before"
"""Tells whether the machine was quiet; the only fact that may differ when a measurement is resumed."""

_LIBRARIES = ("stridevit", "locust", "gevent", "geventhttpclient", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow")
_NO_SETTINGS = (
    "STRIDEVIT_LOAD_",
    "STRIDEVIT_DATA",
    "STRIDEVIT_AGREEMENT",
    "STRIDEVIT_SERVICE_PYTHON",
    "STRIDEVIT_OPENAPI_TOOLS",
)


def environment() -> dict[str, str]:
    """Facts by name: commit, CPU, memory, versions, and the service's settings in the environment."""
    return {
        "commit": git_commit(),
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
        # Where several are on the path, the first is the one that is imported.
        **{name: found[0].version for name in _LIBRARIES if (found := list(distributions(name=name)))},
        # These settings reach every service that is started. Keys and paths are left out.
        **{
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("STRIDEVIT_")
            and not name.startswith(_NO_SETTINGS)
            and "KEY" not in name
            and "/" not in value
        },
        LOAD_AVERAGE: f"{os.getloadavg()[0]:.2f}",
    }


def this_command() -> str:
    """The command line of this process, ready to be run again."""
    script = Path(sys.argv[0])
    program = ["python", "-m", script.parent.name] if script.name == "__main__.py" else [script.name]
    return shlex.join([*program, *sys.argv[1:]])
