"""Data sets, held as uint8 arrays in memory: CIFAR-100 from parquet files, and scikit-learn's digits.

Nothing is downloaded. An image that cannot be decoded is reported by file and row.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from training.recipes import DatasetName

_SPLIT_SEED = 0
"""Splits are fixed: they do not follow the seed of a run, so that runs of any seed hold out the same images."""


class DataError(Exception):
    """The data is missing or damaged; the message says what to put where."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images uint8 (n,H,W,3) and their labels int64 (n,)."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: npt.NDArray[np.int64]) -> "Split":
        """The samples at `index`."""
        return Split(images=self.images[index], labels=self.labels[index])


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set as a run sees it. `mean` and `std` are of the train split, in units of the 0..1 range."""

    name: DatasetName
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def fingerprint(self) -> str:
        """sha256 over all pixels and labels, train before test."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(np.ascontiguousarray(split.images).tobytes())
            digest.update(split.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def load_dataset(name: str, folder: Path | None = None) -> Dataset:
    """Load a data set; `folder` is needed for all but `digits`. Raises DataError, also for a name it does not know."""
    if name not in get_args(DatasetName):
        raise DataError(f"unknown data set {name!r}: one of {', '.join(get_args(DatasetName))}")
    if name == "digits":
        return _load_digits()
    if folder is None:
        raise DataError(f"{name} needs --data DIR (or STRIDEVIT_DATA): {_WHERE_CIFAR}")
    return _load_cifar100(folder)


def split_holdout(train: Split, size: int) -> tuple[Split, Split]:
    """Split `train` into (fit, held out), `size` images stratified by class in the second. The same for every seed."""
    if size == 0:
        return train, train.take(np.empty(0, dtype=np.int64))
    fit, held = train_test_split(np.arange(len(train)), test_size=size, random_state=_SPLIT_SEED, stratify=train.labels)
    return train.take(np.sort(fit)), train.take(np.sort(held))


def _load_digits() -> Dataset:
    bunch = load_digits()
    small = (bunch.images * (255 / 16)).round().astype(np.uint8)
    images = np.stack(
        [
            np.asarray(Image.fromarray(digit).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB"))
            for digit in small
        ]
    )
    labels = bunch.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, random_state=_SPLIT_SEED, stratify=labels)
    everything = Split(images=images, labels=labels)
    return _dataset("digits", tuple("0123456789"), everything.take(train), everything.take(test))


_WHERE_CIFAR = (
    "get the data set uoft-cs/cifar100 from the Hugging Face hub and name the folder that holds its "
    "train-*.parquet and test-*.parquet files"
)


def _load_cifar100(folder: Path) -> Dataset:
    if not any(folder.glob("train-*.parquet")) and (folder / "cifar100").is_dir():
        folder = folder / "cifar100"
    train, names = _read_parquet(folder, "train")
    test, _ = _read_parquet(folder, "test")
    return _dataset("cifar100", names, train, test)


def _read_parquet(folder: Path, split: str) -> tuple[Split, tuple[str, ...]]:
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise DataError(f"no {split}-*.parquet in {folder}: {_WHERE_CIFAR}")
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[npt.NDArray[np.int64]] = []
    for file in files:
        try:
            table = pq.read_table(file)
            encoded = table.column("img").combine_chunks().field("bytes").to_pylist()
            labels.append(table.column("fine_label").to_numpy().astype(np.int64))
        except (OSError, KeyError, pa.ArrowException) as error:
            raise DataError(f"{file} cannot be read ({error}): fetch it again") from error
        for row, data in enumerate(encoded):
            try:
                images.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
            except (OSError, ValueError, SyntaxError) as error:
                raise DataError(f"{file} row {row}: the image cannot be decoded ({error})") from error
    names = _class_names(folder, table.schema)
    return Split(images=np.stack(images), labels=np.concatenate(labels)), names


def _class_names(folder: Path, schema: pa.Schema) -> tuple[str, ...]:
    """From the hub's metadata inside the parquet file, else from classes.json beside it."""
    hub = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = hub.get("info", {}).get("features", {}).get("fine_label", {}).get("names")
    beside = folder / "classes.json"
    if names is None and beside.is_file():
        names = json.loads(beside.read_text())["fine_label_names"]
    if names is None:
        raise DataError(f"no class names in {folder}: neither in the parquet metadata nor in classes.json")
    return tuple(names)


def _dataset(name: DatasetName, classes: tuple[str, ...], train: Split, test: Split) -> Dataset:
    pixels = train.images.reshape(-1, 3)
    mean = pixels.mean(axis=0, dtype=np.float64) / 255
    # Var = E[x²] - E[x]², exact enough in float64 and without a float copy of all images.
    squares = np.square(np.arange(256, dtype=np.float64))
    power = np.array([np.bincount(pixels[:, c], minlength=256) @ squares for c in range(3)]) / len(pixels)
    std = np.sqrt(power / 255**2 - mean**2)
    return Dataset(
        name=name,
        classes=classes,
        train=train,
        test=test,
        mean=(round(float(mean[0]), 5), round(float(mean[1]), 5), round(float(mean[2]), 5)),
        std=(round(float(std[0]), 5), round(float(std[1]), 5), round(float(std[2]), 5)),
    )
