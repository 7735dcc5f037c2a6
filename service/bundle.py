"""Bundles: a model as files that can be verified, written by export and read by the service.

    models/<name>/<version>/model.onnx      the graph: uint8 images in, logits and probabilities out
                            manifest.json   what it is (service/manifest.py)
                            labels.txt      one class name per line
                            golden.npz      encoded images and the outputs they must give
                            SHA256SUMS      over all of the above

A bundle never changes once published: a new model is a new version. Publishing is one rename.

Its folder holds these files and nothing else, hidden files included: what ONNX Runtime would load beside the graph
(external data) must not escape the digests. A link or a special file is refused without opening it.
"""

import hashlib
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from service.errors import BundleError
from service.manifest import NAME_PATTERN, Manifest

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
LABELS_FILE = "labels.txt"
GOLDEN_FILE = "golden.npz"
SUMS_FILE = "SHA256SUMS"
CONTENT_FILES = (GOLDEN_FILE, LABELS_FILE, MANIFEST_FILE, MODEL_FILE)

MAX_GOLDEN_BYTES = 256 * 1024 * 1024
"""Largest `golden.npz`, both packed and unpacked: a few images and their outputs take far less."""

_MAX_BYTES = {SUMS_FILE: 64 * 1024, MANIFEST_FILE: 8 * 1024 * 1024, LABELS_FILE: 16 * 1024 * 1024}
"""Limits of the files that are read into memory whole: ten times what a million test images (a bit each) or 20,000
labels need."""

MAX_FILE_BYTES = {**_MAX_BYTES, GOLDEN_FILE: MAX_GOLDEN_BYTES, MODEL_FILE: 2 * 1024**3}
"""Largest size of each file; a graph in one file cannot be larger, because of its encoding."""

_SUM_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<file>[A-Za-z0-9_.-]+)")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
"""Other spellings of a number, such as `01`, would be a second folder for the same version."""

Signature = tuple[tuple[str, int, int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Encoded images and the outputs they must give: logits and probabilities float32 (n, classes)."""

    images: tuple[bytes, ...]
    logits: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle on disk whose digests and manifest have been checked."""

    folder: Path
    version: int
    manifest: Manifest
    labels: tuple[str, ...]

    @property
    def model_path(self) -> Path:
        """The ONNX file."""
        return self.folder / MODEL_FILE

    def golden(self) -> Golden:
        """Read `golden.npz`. Raises BundleError."""
        path = self.folder / GOLDEN_FILE
        try:
            with _opened(path, MAX_GOLDEN_BYTES) as stream:
                with zipfile.ZipFile(stream) as members:
                    unpacked = sum(member.file_size for member in members.infolist())
                if unpacked > MAX_GOLDEN_BYTES:
                    raise BundleError(f"{path}: unpacks to {unpacked} bytes, more than {MAX_GOLDEN_BYTES}")
                stream.seek(0)
                with np.load(stream, allow_pickle=False) as arrays:
                    logits, probabilities = arrays["logits"], arrays["probabilities"]
                    images = tuple(arrays[f"image_{number}"].tobytes() for number in range(len(logits)))
        # NotImplementedError and RuntimeError: a kind of compression or encryption that zipfile does not know.
        except (OSError, ValueError, KeyError, EOFError, TypeError, MemoryError, RuntimeError) as error:
            raise BundleError(f"{path}: cannot be read ({error})") from error
        except (zipfile.BadZipFile, zlib.error) as error:
            raise BundleError(f"{path}: cannot be read ({error})") from error
        expected = (len(images), self.manifest.num_classes)
        if not images or logits.shape != expected or probabilities.shape != expected:
            raise BundleError(f"{path}: outputs of shape {logits.shape} and {probabilities.shape}, not {expected}")
        return Golden(images=images, logits=logits, probabilities=probabilities)


def is_version(name: str) -> bool:
    """Whether the name of a folder is that of a version: a decimal number in ASCII without a leading zero."""
    return _VERSION.fullmatch(name) is not None


def parse_key(folder: str) -> tuple[str, int] | None:
    """Name and version from `<name>/<version>`; None for anything else, such as a path that leads elsewhere."""
    name, _, version = folder.partition("/")
    return (name, int(version)) if re.fullmatch(NAME_PATTERN, name) and is_version(version) else None


def versions(repository: Path, name: str) -> list[int]:
    """Published versions of a model, ascending; empty without a folder of that name.

    Raises OSError if its folder cannot be listed.
    """
    try:
        with os.scandir(repository / name) as entries:
            return sorted(int(entry.name) for entry in entries if is_version(entry.name) and entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a repository holds."""

    versions: dict[str, list[int]]
    """By name; only models that have a version."""
    unreadable: dict[str, str]
    """By name: why a folder cannot be listed."""

    @property
    def names(self) -> list[str]:
        """All of them."""
        return sorted({*self.versions, *self.unreadable})


def list_repository(repository: Path) -> Listing:
    """List a repository. Raises BundleError if there is no such folder or if it cannot be listed."""
    try:
        names = [name for name in os.listdir(repository) if re.fullmatch(NAME_PATTERN, name)]  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"no model repository at {repository}: name one with --repository") from None
    except OSError as error:
        raise BundleError(f"the model repository {repository} cannot be listed ({error.strerror})") from error
    found: dict[str, list[int]] = {}
    unreadable: dict[str, str] = {}
    for name in sorted(names):
        try:
            published = versions(repository, name)
        except OSError as error:
            unreadable[name] = f"its folder cannot be listed ({error.strerror})"
        else:
            if published:
                found[name] = published
    return Listing(versions=found, unreadable=unreadable)


def model_names(repository: Path) -> list[str]:
    """Names in a repository that have at least one version. Raises BundleError as `list_repository` does."""
    return list(list_repository(repository).versions)


def signature(folder: Path) -> Signature | None:
    """Names, kinds, sizes, times and inodes of what a folder holds, to notice a change; None if it cannot be listed.

    The time is that of the inode's last change, so that changed permissions are noticed too.
    """
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return None
    return tuple(
        sorted((name, status.st_mode, status.st_size, status.st_ctime_ns, status.st_ino) for name, status in found)
    )


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle and check every digest. Raises BundleError naming the file that is wrong."""
    if not is_version(folder.name):
        raise BundleError(f"{folder} is not a bundle: the folder of a version is named 1, 2, 3 and so on")
    _check_listing(folder)
    sums = _read_sums(folder / SUMS_FILE)
    for file in CONTENT_FILES:
        path = folder / file
        try:
            with _opened(path) as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror})") from error
        if digest != sums[file]:
            raise BundleError(f"{path}: sha256 is {digest}, but {SUMS_FILE} says {sums[file]}")
    try:
        manifest = Manifest.model_validate_json(_read(folder / MANIFEST_FILE))
    except ValidationError as error:
        raise BundleError(f"{folder / MANIFEST_FILE}: {error}") from error
    try:
        labels = tuple(_read(folder / LABELS_FILE).decode("utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise BundleError(f"{folder / LABELS_FILE}: not UTF-8 text ({error})") from error
    if len(labels) != manifest.num_classes:
        raise BundleError(f"{folder / LABELS_FILE}: {len(labels)} labels for {manifest.num_classes} classes")
    if folder.parent.name != manifest.name:
        raise BundleError(f"{folder / MANIFEST_FILE}: names {manifest.name!r}, but lies in {folder.parent}")
    return Bundle(folder=folder, version=int(folder.name), manifest=manifest, labels=labels)


def content_digest(folder: Path) -> str:
    """SHA-256 of `SHA256SUMS`, which stands for all that a bundle holds. Raises BundleError."""
    return hashlib.sha256(_read(folder / SUMS_FILE)).hexdigest()


def publish(repository: Path, manifest: Manifest, *, model: bytes, labels: tuple[str, ...], golden: Golden) -> Path:
    """Write a bundle as the next free version of its name and return its folder."""
    parent = repository / manifest.name
    parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=parent))
    try:
        staging.chmod(0o755)
        (staging / MODEL_FILE).write_bytes(model)
        (staging / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (staging / LABELS_FILE).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        arrays: dict[str, npt.NDArray[Any]] = {"logits": golden.logits, "probabilities": golden.probabilities}
        arrays |= {f"image_{number}": np.frombuffer(image, np.uint8) for number, image in enumerate(golden.images)}
        np.savez(staging / GOLDEN_FILE, allow_pickle=False, **arrays)
        sums = [f"{hashlib.sha256((staging / file).read_bytes()).hexdigest()}  {file}\n" for file in CONTENT_FILES]
        (staging / SUMS_FILE).write_text("".join(sums), encoding="utf-8")
        return _rename_to_next_version(staging, parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _rename_to_next_version(staging: Path, parent: Path) -> Path:
    while True:
        taken = versions(parent.parent, parent.name)
        target = parent / str((taken[-1] if taken else 0) + 1)
        try:
            staging.rename(target)
        except OSError:
            if not target.exists():
                raise
            continue  # Another process published this version meanwhile: take the next.
        if hasattr(os, "O_DIRECTORY"):
            descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(descriptor)
            os.close(descriptor)
        return target


def _check_listing(folder: Path) -> None:
    """Refuse a folder that holds anything but the files of a bundle, from its listing alone."""
    try:
        with os.scandir(folder) as entries:
            kinds = {entry.name: entry.stat(follow_symlinks=False).st_mode for entry in entries}
    except OSError as error:
        raise BundleError(f"{folder}: cannot be listed ({error.strerror})") from error
    for file in (SUMS_FILE, *CONTENT_FILES):
        if file not in kinds:
            raise BundleError(f"{folder / file}: missing")
    for name, mode in sorted(kinds.items()):
        if name not in (SUMS_FILE, *CONTENT_FILES):
            raise BundleError(f"{folder / name}: not listed in {SUMS_FILE}: a bundle holds nothing else, remove it")
        if not stat.S_ISREG(mode):
            raise BundleError(f"{folder / name}: is {_kind(mode)}, not a file: put the file itself in its place")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


@contextmanager
def _opened(path: Path, max_bytes: int | None = None) -> Iterator[BufferedReader]:
    """A regular file of at most `max_bytes`, opened so that files of other kinds, such as FIFOs, cannot block the call.

    Raises BundleError or OSError.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    with os.fdopen(os.open(path, flags), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path}: is {_kind(status.st_mode)}, not a file")
        if max_bytes is not None and status.st_size > max_bytes:
            raise BundleError(f"{path}: {status.st_size} bytes, more than {max_bytes}")
        yield stream


def _read(path: Path) -> bytes:
    """The whole of a small file. Raises BundleError."""
    limit = _MAX_BYTES[path.name]
    try:
        with _opened(path, limit) as stream:
            return stream.read(limit)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from error


def _read_sums(path: Path) -> dict[str, str]:
    return parse_sums(_read(path), path)


def parse_sums(content: bytes, path: object) -> dict[str, str]:
    """The digest of each file, from the content of a `SHA256SUMS`; errors name `path`. Raises BundleError."""
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: cannot be read ({error})") from error
    if not text.endswith("\n"):
        raise BundleError(f"{path}: ends in the middle of a line")
    sums: dict[str, str] = {}
    # Not splitlines(), which takes other characters for line ends too.
    for line in text.removesuffix("\n").split("\n"):
        match = _SUM_LINE.fullmatch(line)
        if match is None:
            raise BundleError(f"{path}: malformed line {line!r}")
        sums[match["file"]] = match["digest"]
    if sorted(sums) != sorted(CONTENT_FILES):
        raise BundleError(f"{path}: lists {', '.join(sorted(sums))}, expected {', '.join(CONTENT_FILES)}")
    return sums
