"""The file of API keys, read at start and again whenever it changes, on a thread of its own.

A file system that hangs holds up nothing but that thread. A file that is broken leaves the old keys in use.
"""

import os
import queue
import stat
import threading
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from service.errors import StartupError
from service.keys import SCOPES, KeyEntry, KeyRing

log = structlog.get_logger()

MAX_BYTES: Final = 4 * 1024 * 1024
"""Enough for about 20,000 keys: a larger file is hardly a file of keys."""

_Version = tuple[int, int, int, int]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    keys: tuple[KeyEntry, ...] = ()


def entries_of_settings(api_key_hashes: Sequence[str], admin_key_hash: str | None) -> list[KeyEntry]:
    """The keys that the settings name by their hashes alone: `key-1`, `key-2`, ... and `admin`, which may do all."""
    entries = [
        KeyEntry(name=f"key-{number}", sha256=digest, scopes=frozenset({"classify", "read"}))
        for number, digest in enumerate(dict.fromkeys(api_key_hashes), 1)
        if digest != admin_key_hash
    ]
    if admin_key_hash:
        entries.append(KeyEntry(name="admin", sha256=admin_key_hash, scopes=frozenset(SCOPES)))
    return entries


def read_keys(path: Path) -> tuple[tuple[KeyEntry, ...], _Version]:
    """The entries of a file, and what distinguishes its present version from others. Raises ValueError or OSError."""
    # A pipe without a writer would block an ordinary open.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123 (a descriptor is no path)
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"it exceeds {MAX_BYTES:,} bytes")
    try:
        return _File.model_validate(tomllib.loads(text.decode("utf-8"))).keys, _version(status)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_input=False))
        raise ValueError("; ".join(problems)) from None


class KeyFile:
    """Keeps a ring of keys in step with the file, in addition to the keys of the settings."""

    def __init__(self, path: Path, ring: KeyRing, *, fixed: Sequence[KeyEntry], poll_seconds: float) -> None:
        """Reads the file. `poll_seconds`: how often it is checked; 0: only on request. Raises StartupError."""
        self._path, self._ring, self._fixed, self._poll_seconds = path, ring, fixed, poll_seconds
        # Its `put` is reentrant, so a signal handler may call it.
        self._wishes: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="keys", daemon=True)
        try:
            self._seen: _Version | None = self._load()
        except (OSError, ValueError) as error:
            raise StartupError(f"keys_file {path}: {_reason(error)}") from error

    def start(self) -> None:
        """Watch the file from here on."""
        self._thread.start()

    def reload(self) -> None:
        """Read the file again soon, whether or not it has changed. A signal handler may call this."""
        self._wishes.put(True)

    def close(self) -> None:
        """Stop watching, without waiting for the thread: the file system may hang."""
        self._wishes.put(False)

    def refresh(self, *, asked: bool) -> None:
        """Read the file if it has changed or is `asked` for; if that fails, the old keys stay and the log says why."""
        try:
            version = _version(self._path.stat())
            if version == self._seen and not asked:
                return
            self._seen = version
            self._seen = self._load()
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError):
                if self._seen is None and not asked:
                    return
                self._seen = None
            log.error("the file of keys is broken: the old keys stay", file=str(self._path), reason=_reason(error))
        else:
            log.info("keys read", file=str(self._path), keys=len(self._ring.keys))

    def _load(self) -> _Version:
        entries, version = read_keys(self._path)
        self._ring.replace((*self._fixed, *entries))
        return version

    def _watch(self) -> None:
        # Check at once, too: loading the models may have taken a while since the file was read.
        asked = False
        while True:
            try:
                self.refresh(asked=asked)
            except Exception:  # the next look may succeed
                log.exception("looking at the file of keys failed")
            try:
                if not self._wishes.get(timeout=self._poll_seconds or None):
                    return
                asked = True
            except queue.Empty:
                asked = False


def _version(status: os.stat_result) -> _Version:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
