"""Bundles: a model as files that can be verified, written by export and read by the service.

    models/<name>/<version>/model.onnx      the graph: uint8 images in, logits and probabilities out
                            manifest.json   what it is (service/manifest.py)
                            labels.txt      one class name per line
                            golden.npz      encoded images and the outputs they must give
                            SHA256SUMS      over all of the above

A bundle never changes once published: a new model is a new version. Publishing is one rename.
"""

import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
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

_SUM_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<file>[A-Za-z0-9_.-]+)")


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
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                logits, probabilities = arrays["logits"], arrays["probabilities"]
                images = tuple(arrays[f"image_{number}"].tobytes() for number in range(len(logits)))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise BundleError(f"{path}: cannot be read ({error})") from error
        expected = (len(images), self.manifest.num_classes)
        if not images or logits.shape != expected or probabilities.shape != expected:
            raise BundleError(f"{path}: outputs of shape {logits.shape} and {probabilities.shape}, not {expected}")
        return Golden(images=images, logits=logits, probabilities=probabilities)


def versions(repository: Path, name: str) -> list[int]:
    """Published versions of a model, ascending."""
    folder = repository / name
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir())


def model_names(repository: Path) -> list[str]:
    """Names in a repository that have at least one version. Raises BundleError if there is no such folder."""
    if not repository.is_dir():
        raise BundleError(f"no model repository at {repository}: name one with --repository")
    return sorted(
        entry.name
        for entry in repository.iterdir()
        if re.fullmatch(NAME_PATTERN, entry.name) and versions(repository, entry.name)
    )


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle and check every digest. Raises BundleError naming the file that is wrong."""
    sums = _read_sums(folder / SUMS_FILE)
    for file in CONTENT_FILES:
        path = folder / file
        if not path.is_file():
            raise BundleError(f"{path}: missing")
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error})") from error
        if digest != sums[file]:
            raise BundleError(f"{path}: sha256 is {digest}, but {SUMS_FILE} says {sums[file]}")
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except ValidationError as error:
        raise BundleError(f"{folder / MANIFEST_FILE}: {error}") from error
    try:
        labels = tuple((folder / LABELS_FILE).read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise BundleError(f"{folder / LABELS_FILE}: not UTF-8 text ({error})") from error
    if len(labels) != manifest.num_classes:
        raise BundleError(f"{folder / LABELS_FILE}: {len(labels)} labels for {manifest.num_classes} classes")
    if folder.parent.name != manifest.name:
        raise BundleError(f"{folder / MANIFEST_FILE}: names {manifest.name!r}, but lies in {folder.parent}")
    return Bundle(folder=folder, version=int(folder.name), manifest=manifest, labels=labels)


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


def _read_sums(path: Path) -> dict[str, str]:
    try:
        text = path.read_bytes().decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
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
