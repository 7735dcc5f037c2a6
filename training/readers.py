"""Readers of encoded images and labels: the layouts of a folder, or the Hugging Face hub.

    DIR/train-*.parquet, test-*.parquet     as the hub stores data sets             datasets
    DIR/train-*.tar, validation-*.tar       WebDataset shards: key.jpg, key.cls     datasets
    DIR/train/CLASS/*, DIR/val/CLASS/*      one folder per class                    torchvision
    hub:OWNER/NAME                          by its name on the Hugging Face hub     datasets

All are read by index, so that order, resumption and any number of processes depend on the index alone. To that end
`datasets` copies all but class folders into its cache once (HF_HOME sets its location).
"""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import numpy.typing as npt
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from torchvision.datasets import ImageFolder

HUB = "hub:"
TRAIN, EVALUATION = ("train",), ("validation", "valid", "val", "test")
"""Names of splits, best first: validation before test, because the test split of ImageNet has no labels."""

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("fine_label", "label", "labels", "cls")


class DataError(Exception):
    """The data is missing or damaged; the message says what is needed where."""


class Reader(Protocol):
    """One split: encoded images by index, and all labels."""

    split: str
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    """Empty if the data set does not name them."""

    def encoded(self, row: int) -> bytes:
        """The image file's bytes."""
        ...

    def where(self, row: int) -> str:
        """The image's name in an error message."""
        ...


def open_split(source: str, names: Sequence[str], *, hint: str) -> Reader:
    """The first split of `names` that `source` (a folder, or hub:OWNER/NAME) has.

    Raises DataError, with `hint` on where to get the data, if there is none or if a file of it is damaged.
    """
    if source.startswith(HUB):
        return _from_hub(source.removeprefix(HUB), names)
    folder = Path(source)
    for name in names:
        if files := sorted(folder.glob(f"{name}-*.parquet")):
            return _from_parquet(files, name)
        if files := sorted(folder.glob(f"{name}-*.tar")):
            return _from_shards(files, name)
        if (folder / name).is_dir():
            return _ClassFolders(folder / name, name)
    wanted = ", ".join(f"{name}-*.parquet" for name in names)
    raise DataError(f"no {wanted} in {folder}, nor .tar shards or class folders of that name: {hint}")


class _Table:
    """Rows of a `datasets` table; `origin` lists the file of each part and its number of rows."""

    def __init__(
        self, table: datasets.Dataset, split: str, origin: list[tuple[str, int]], classes: Path | None
    ) -> None:
        self.split = split
        image = _column(table, _IMAGE_COLUMNS, origin[0][0])
        label = _column(table, _LABEL_COLUMNS, origin[0][0])
        try:
            self.labels = np.asarray(table.with_format("numpy")[label][:], dtype=np.int64)
        except (TypeError, ValueError):
            raise DataError(
                f"{origin[0][0]}: column {label} holds {table.features[label].dtype}, not class indices"
            ) from None
        self.classes = _class_names(table, label, classes)
        self._image = image
        self._table = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        self._origin = origin
        # WebDataset shards name each sample.
        self._keys = table["__key__"] if "__key__" in table.column_names else None

    def encoded(self, row: int) -> bytes:
        cell = self._table[row][self._image]
        return cell["bytes"] if cell["bytes"] else Path(cell["path"]).read_bytes()

    def where(self, row: int) -> str:
        if self._keys is not None:
            return f"{self._origin[0][0]} sample {self._keys[row]}"
        for file, rows in self._origin:
            if row < rows:
                return f"{file} row {row}"
            row -= rows
        raise IndexError(row)


class _ClassFolders:
    """torchvision's ImageFolder: one folder per class, in alphabetical order."""

    def __init__(self, folder: Path, split: str) -> None:
        self.split = split
        try:
            found = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise DataError(f"{folder} is not laid out as CLASS/picture.jpg: {error}") from error
        self.classes = tuple(found.classes)
        self.labels = np.asarray(found.targets, dtype=np.int64)
        # Bytes take a quarter of the memory of text, which matters for a million paths.
        self._files = np.array([os.fsencode(path) for path, _ in found.samples])

    def encoded(self, row: int) -> bytes:
        return Path(self.where(row)).read_bytes()

    def where(self, row: int) -> str:
        return os.fsdecode(self._files[row])


def _from_parquet(files: list[Path], split: str) -> Reader:
    parts = []
    for file in files:
        with _readable(f"{file} cannot be read", "fetch it again"):
            parts.append(datasets.Dataset.from_parquet(str(file)))
    origin = [(str(file), len(part)) for file, part in zip(files, parts, strict=True)]
    return _Table(datasets.concatenate_datasets(parts), split, origin, files[0].parent / "classes.json")


def _from_shards(files: list[Path], split: str) -> Reader:
    folder = files[0].parent
    origin = f"{folder}/{split}-*.tar"
    with _readable(
        f"{origin} cannot be read as WebDataset shards", "each sample needs files such as 0001.jpg and 0001.cls"
    ):
        table = datasets.load_dataset("webdataset", data_files={split: [str(file) for file in files]}, split=split)
    return _Table(table, split, [(origin, len(table))], folder / "classes.json")


def _from_hub(name: str, names: Sequence[str]) -> Reader:
    with _readable(
        f"{HUB}{name} cannot be loaded from the Hugging Face hub",
        "check the name and the connection, log in with `hf auth login` where it is gated, or name a folder that holds "
        "its parquet files",
    ):
        has = datasets.get_dataset_split_names(name)
        split = next((wanted for wanted in names if wanted in has), None)
        if split is None:
            raise DataError(f"{HUB}{name} has no split {' or '.join(names)}, but {', '.join(has)}")
        table = datasets.load_dataset(name, split=split)
    return _Table(table, split, [(f"{HUB}{name} {split}", len(table))], None)


@contextmanager
def _readable(failure: str, fix: str) -> Iterator[None]:
    """Turn what `datasets` raises into a DataError: what failed, why, and how to fix it."""
    try:
        yield
    except (DatasetNotFoundError, DatasetGenerationError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            fix = "set HF_HOME to a folder with room for a copy of the data"
        raise DataError(f"{failure} ({cause}): {fix}") from error


def _column(table: datasets.Dataset, known: Sequence[str], origin: str) -> str:
    for name in known:
        if name in table.column_names:
            return name
    raise DataError(f"{origin} has no column {' or '.join(known)}, but {', '.join(table.column_names)}")


def _class_names(table: datasets.Dataset, label: str, beside: Path | None) -> tuple[str, ...]:
    """From the table's metadata, else from classes.json beside it (under the column's name, plus `_names`)."""
    feature: Any = table.features[label]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    if beside is not None and beside.is_file():
        try:
            return tuple(json.loads(beside.read_text(encoding="utf-8"))[f"{label}_names"])
        except (KeyError, TypeError, ValueError):
            raise DataError(f'{beside} is not a JSON object with a list "{label}_names"') from None
    return ()
