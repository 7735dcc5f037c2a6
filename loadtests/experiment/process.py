"""Child processes that end with the measurement, even if it is killed."""

import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from service.host import process_tree

_STOP_SECONDS = 20

# PR_SET_PDEATHSIG outlives exec. A service that outlives its measurement would share pages with that of the next one
# and so falsify its memory figures. The check of the parent covers the case that it died before the call.
_GUARD = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Child(subprocess.Popen[str]):
    """A process that ends, with its descendants, at the end of a `with`."""

    def __exit__(self, *error: Any) -> None:
        end(self)
        super().__exit__(*error)


def start(
    command: Sequence[str],
    *,
    stdout: int | IO[Any] | None,
    stderr: int | IO[Any] | None,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    cores: Collection[int] = (),
) -> Child:
    """Start a process that Linux kills when the calling thread ends, whatever ends it: call it from the main thread.

    `cores`: the only ones it may use; empty for all.
    """
    guard = [sys.executable, "-c", _GUARD, str(os.getpid())] if sys.platform == "linux" else []
    with _restricted(cores):
        return Child([*guard, *command], stdout=stdout, stderr=stderr, env=environment, cwd=folder, text=True)


@contextmanager
def _restricted(cores: Collection[int]) -> Iterator[None]:
    """What is started in the block inherits these cores from the calling thread."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def end(process: subprocess.Popen[Any]) -> None:
    """Stop a process and its descendants: by SIGTERM, then by SIGKILL."""
    family = process_tree(process.pid)
    for member in family:
        with suppress(psutil.Error):
            member.terminate()
    for member in psutil.wait_procs(family, timeout=_STOP_SECONDS)[1]:
        with suppress(psutil.Error):
            member.kill()
    process.wait()
