"""Temporary folders for loads, and the removal of those that killed processes have left.

Each has a lock file whose lock ends with its process, however that ends. So a folder without an owner can be told from
one that another process uses, even where process ids mean nothing, as in containers that share a folder.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX, _LOCK = "stridevit-load-", "lock"


@contextmanager
def scratch_folder() -> Iterator[Path | None]:
    """A new folder for temporary files, removed afterwards; None if none can be created.

    First it removes those of processes that were killed.
    """
    try:
        parent = Path(tempfile.gettempdir())
        _remove_abandoned(parent)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError:  # nowhere to write to
        yield None
        return
    lock: int | None = None
    # Where files cannot be locked, the folder of a killed process stays.
    with contextlib.suppress(OSError):
        lock = _locked(folder / f".{_LOCK}")
        # It gets its name once it is locked, so that no process finds one that is not.
        (folder / f".{_LOCK}").rename(folder / _LOCK)
    try:
        yield folder
    finally:
        _remove(folder)
        if lock is not None:
            os.close(lock)


def _locked(path: Path) -> int:
    """The descriptor of a locked file. Raises OSError if another process has locked it, among other reasons."""
    # Another user may have put something else there.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        # Another process may own it, or be creating or removing it.
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and (folder / _LOCK).exists():
                lock = _locked(folder / _LOCK)
                _remove(folder)
                os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder, its lock last: without it, what is left would stay if this process is killed here."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name != _LOCK:
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)
