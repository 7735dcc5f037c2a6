"""The copy of a repository on this machine: an ordinary repository folder, and the files in it by their digests.

    <cache>/<address>/models/<name>/<version>/   the repository that is served
                      blobs/<SHA-256>            every file of it, by hard links
                      partial/                   what is being written; whatever a killed process left is removed
                      lock                       held by the one process that changes any of this

A version appears by one rename, with all digests right, or not at all.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from service.bundle import CONTENT_FILES, MAX_FILE_BYTES, SUMS_FILE, list_repository, parse_sums
from service.errors import BundleError, RepositoryError
from service.remote.store import Key

_NO_LINKS: Final = (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


class Blob:
    """A file that is being written; it gets its name once it is complete and correct."""

    def __init__(self, stream: BinaryIO, *, label: str, room: int) -> None:
        self._stream, self._label, self._room = stream, label, room
        self._sum, self.size = hashlib.sha256(), 0

    def take(self, piece: bytes) -> None:
        """Write a piece. Raises BundleError if there is no room for it."""
        self.size += len(piece)
        if self.size > self._room:
            raise BundleError(f"{self._label}: exceeds {self._room} bytes, its limit or what the cache has left")
        self._sum.update(piece)
        self._stream.write(piece)

    @property
    def digest(self) -> str:
        """SHA-256 of what was written so far."""
        return self._sum.hexdigest()


class Cache:
    """The folder of one address. All but `locked`, `folder` and `present` need the lock."""

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        """Raises RepositoryError if the folder cannot be made or written to."""
        self._root, self._max_bytes = root, max_bytes
        self.folder = root / "models"
        self._blobs, self._partial = root / "blobs", root / "partial"
        self._checked: dict[tuple[int, int, int], str] = {}
        """The digests of files as this process has read or written them."""
        try:
            for folder in (self.folder, self._blobs, self._partial):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._partial):
                pass
        except OSError as error:
            raise RepositoryError(
                f"the cache {root} cannot be written to ({error.strerror}): name a folder on a volume or a tmpfs with "
                "--repository-cache"
            ) from error

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Try once to take the lock; yields whether this process has it. The lock ends with the process in any case."""
        descriptor = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)

    def clear_partial(self) -> None:
        """Remove what a killed process has left."""
        for path in self._partial.iterdir():
            _remove(path)

    def present(self) -> list[Key]:
        """All versions that are there."""
        return [(name, version) for name, some in list_repository(self.folder).versions.items() for version in some]

    def holds(self, key: Key, sums: bytes) -> bool:
        """Whether a version is there with this `SHA256SUMS`, and all its files match."""
        folder = self._version(key)
        try:
            if (folder / SUMS_FILE).read_bytes() != sums:
                return False
            digests = parse_sums(sums, folder)
            return all(self._is_right(folder / file, digest) for file, digest in digests.items())
        except (OSError, BundleError):
            return False

    def has(self, digest: str) -> bool:
        """Whether there is a file with this digest; one that was damaged is removed."""
        path = self._blobs / digest
        if not path.exists():
            return False
        if self._is_right(path, digest):
            return True
        path.unlink(missing_ok=True)
        return False

    @contextmanager
    def blob(self, digest: str, *, label: str, file: str) -> Iterator[Blob]:
        """A file to write, which is kept only if it has this digest. Raises BundleError if it has another one."""
        room = min(MAX_FILE_BYTES[file], self.room())
        descriptor, name = tempfile.mkstemp(dir=self._partial)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield (blob := Blob(stream, label=label, room=room))
                if blob.digest != digest:
                    raise BundleError(f"{label}: sha256 is {blob.digest}, but {SUMS_FILE} says {digest}")
                stream.flush()
                os.fchmod(stream.fileno(), 0o444)
                os.fsync(stream.fileno())
            Path(name).rename(self._blobs / digest)
            self._checked[_identity(self._blobs / digest)] = digest
        finally:
            Path(name).unlink(missing_ok=True)

    def publish(self, key: Key, sums: bytes, digests: Mapping[str, str]) -> None:
        """Make a version appear whose files are all there, in place of any other one of the same number."""
        target = self._version(key)
        staging = Path(tempfile.mkdtemp(dir=self._partial))
        try:
            for file in CONTENT_FILES:
                _link(self._blobs / digests[file], staging / file)
            (staging / SUMS_FILE).write_bytes(sums)
            staging.chmod(0o755)
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                target.rename(self._partial / f"replaced-{staging.name}")
            staging.rename(target)
            _sync_folder(target.parent)
        finally:
            self.clear_partial()

    def remove(self, key: Key) -> None:
        """Remove a version."""
        target = self._version(key)
        aside = Path(tempfile.mkdtemp(dir=self._partial)) / "removed"
        with contextlib.suppress(FileNotFoundError):
            target.rename(aside)
        _remove(aside.parent)
        with contextlib.suppress(OSError):  # it holds other versions
            target.parent.rmdir()

    def sweep(self) -> None:
        """Remove every file that belongs to no version."""
        used: set[str] = set()
        for key in self.present():
            with contextlib.suppress(OSError, BundleError):
                used |= set(parse_sums((self._version(key) / SUMS_FILE).read_bytes(), key).values())
        for path in self._blobs.iterdir():
            if path.name not in used:
                path.unlink(missing_ok=True)
        self._checked = {identity: digest for identity, digest in self._checked.items() if digest in used}

    def room(self) -> int:
        """Bytes that may be added."""
        sizes: dict[tuple[int, int], int] = {}
        for folder, _, files in os.walk(self._root):
            for file in files:
                with contextlib.suppress(OSError):
                    status = (Path(folder) / file).lstat()
                    sizes[status.st_dev, status.st_ino] = status.st_size
        return max(0, self._max_bytes - sum(sizes.values()))

    def _version(self, key: Key) -> Path:
        name, version = key
        return self.folder / name / str(version)

    def _is_right(self, path: Path, digest: str) -> bool:
        identity = _identity(path)
        if identity not in self._checked:
            with path.open("rb") as stream:
                self._checked[identity] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._checked[identity] == digest


def _identity(path: Path) -> tuple[int, int, int]:
    """Identifies a file's content. Not by the inode's ctime: every new link changes that."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: not a file")
    return status.st_ino, status.st_size, status.st_mtime_ns


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def default_cache() -> Path:
    """The user's cache folder, or one for this user among the temporary files if that cannot be written to.

    Raises RepositoryError if that one cannot be made, or if other users own it or can write to it.
    """
    with contextlib.suppress(OSError, RuntimeError):  # no such home
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        (home / "stridevit").mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(home / "stridevit", os.W_OK):
            return home / "stridevit"
    folder = Path(tempfile.gettempdir()) / f"stridevit-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise RepositoryError(
            f"no folder for the cache: {folder} ({error.strerror}): name one with --repository-cache"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RepositoryError(f"{folder} belongs to another user: choose a folder of your own with --repository-cache")
    return folder
