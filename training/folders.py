"""A folder of pictures, one folder per class in it: DIR/CLASS/picture.jpg.

There are no splits: a tenth of every class, at least one picture, is the test split. The same files always give the
same test pictures, whatever the seed. Every picture is decoded once; those that cannot be decoded, files that are not
pictures, and classes without pictures are left out and named in `FolderReport`.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from training.readers import EVALUATION, TRAIN, DataError

PICTURES = (*IMG_EXTENSIONS, ".gif", ".avif", ".jp2")
"""File name extensions of pictures; other files are left out."""
FEWEST = 3
"""Fewest pictures of a class: one each to train on, to hold out and to test on."""
_MOST_BROKEN = 0.1
_SPLIT_SEED = 0

Decode = Callable[[bytes], Image.Image]


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """What was left out of a folder, by name."""

    broken: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()

    def warnings(self) -> list[str]:
        """One line for each kind of thing that was left out."""
        kinds = {
            "pictures that cannot be decoded": self.broken,
            "files that are no pictures": self.strays,
            "classes without a picture": self.empty,
        }
        return [f"left out {kind} ({len(names)}): {_listed(names)}" for kind, names in kinds.items() if names]


@dataclass(kw_only=True)
class FolderReader:
    """One split of the folder, as a `Reader` (training/readers.py)."""

    split: str
    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    files: tuple[Path, ...]

    def encoded(self, row: int) -> bytes:
        """The picture's bytes."""
        return self.files[row].read_bytes()

    def where(self, row: int) -> str:
        """The picture's path."""
        return str(self.files[row])


def is_class_folder(folder: Path) -> bool:
    """Whether folders in `folder` hold pictures."""
    return folder.is_dir() and any(_is_picture(file) for sub in _folders(folder) for file in sub.iterdir())


def read_folder(folder: Path, decode: Decode) -> tuple[FolderReader, FolderReader, FolderReport]:
    """The train and the test split of `folder`, and what was found in it.

    Raises DataError if there are fewer than two classes or too few pictures of one, or if more than a tenth of the
    pictures are broken.
    """
    files: list[Path] = []
    labels: list[int] = []
    classes: list[str] = []
    empty: list[str] = []
    strays = [str(file) for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    for sub in _folders(folder):
        found = sorted(file for file in sub.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(sub)))
        pictures = [file for file in found if _is_picture(file)]
        strays += [str(file) for file in found if not _is_picture(file)]
        if not pictures:
            empty.append(sub.name)
            continue
        labels += [len(classes)] * len(pictures)
        classes.append(sub.name)
        files += pictures
    broken = _broken(files, decode)
    if len(broken) > _MOST_BROKEN * len(files):
        raise DataError(
            f"{len(broken)} of {len(files)} pictures in {folder} cannot be decoded: {_listed([*broken.values()])}: "
            "fetch them again, or remove them"
        )
    good = [row for row in range(len(files)) if row not in broken]
    label_N = np.asarray(labels, dtype=np.int64)[good]
    if set(classes) <= {*TRAIN, *EVALUATION}:
        raise DataError(
            f"{folder} holds pictures right in {' and '.join(classes)}: put those of each class into a folder"
        )
    if len(classes) < 2:
        raise DataError(f"{folder} holds pictures of fewer than two classes: put those of each class into a folder")
    counts = np.bincount(label_N, minlength=len(classes))
    few = int(counts.argmin())
    if counts[few] < FEWEST:
        raise DataError(
            f"class {classes[few]!r} of {folder} has {counts[few]} usable pictures, but needs {FEWEST}, one each to "
            "train, to hold out and to test: add some, or remove its folder"
        )
    report = FolderReport(
        broken=tuple(broken.values()),
        strays=tuple(strays),
        empty=tuple(empty),
    )
    kept = [files[row] for row in good]
    held = held_out(label_N)

    def split(name: str, rows: npt.NDArray[np.int64]) -> FolderReader:
        chosen = tuple(kept[row] for row in rows.tolist())
        return FolderReader(split=name, classes=tuple(classes), labels=label_N[rows], files=chosen)

    rest = np.setdiff1d(np.arange(len(label_N)), held)
    return split("train", rest), split("test", held), report


def held_out(label_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A tenth of the rows of each class, at least one, in ascending order."""
    draw = np.random.default_rng(_SPLIT_SEED)
    rows = [np.flatnonzero(label_N == label) for label in np.unique(label_N)]
    return np.sort(np.concatenate([draw.permutation(row)[: max(1, round(len(row) / 10))] for row in rows]))


def _broken(files: Sequence[Path], decode: Decode) -> dict[int, str]:
    """What is wrong with pictures that cannot be decoded, by row."""

    def problem(file: Path) -> str:
        try:
            decode(file.read_bytes())
        except Exception as error:  # noqa: BLE001 (hostile files make Pillow raise almost anything)
            return f"{file} ({(str(error) or repr(error)).splitlines()[0]})"
        return ""

    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return {row: found for row, found in enumerate(pool.map(problem, files)) if found}


def _folders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURES


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
