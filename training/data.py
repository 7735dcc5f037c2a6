"""Data sets as a run sees them: small images held as uint8 arrays, large ones read from disk when they are needed.

Nothing is downloaded unless `hub:OWNER/NAME` is asked for. An image that cannot be decoded is reported by name.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD

from training.images import Fit, decode
from training.readers import EVALUATION, HUB, TRAIN, DataError, Reader, open_split

_SPLIT_SEED = 0
"""Splits are fixed: they do not follow the seed of a run, so that runs of any seed hold out the same images."""

_WHERE_TO_GET = {
    "cifar100": "get the data set uoft-cs/cifar100 from the Hugging Face hub and name the folder that holds its "
    "train-*.parquet and test-*.parquet files, or write --data hub:uoft-cs/cifar100",
    "imagenet": "name a folder with train/ and val/ and a folder a class in them (image-net.org's val archive is flat: "
    "sort it by its labels first), or write --data hub:ILSVRC/imagenet-1k after `hf auth login`",
}
_ANY_LAYOUT = "python -m training train --help lists the layouts"


def _as_it_is(picture: Image.Image) -> Image.Image:
    return picture


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images in memory, uint8 (n,H,W,3), and their labels int64 (n,)."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: npt.NDArray[np.int64]) -> "Split":
        """The samples at `index`."""
        return Split(images=self.images[index], labels=self.labels[index])

    def read(self, index: int, fit: Fit = _as_it_is) -> Image.Image:
        """The picture at `index`, through `fit`."""
        return fit(Image.fromarray(self.images[index]))

    def content(self) -> bytes:
        """All pixels, then all labels."""
        return np.ascontiguousarray(self.images).tobytes() + _bytes_of(self.labels)


@dataclass(frozen=True, kw_only=True)
class Files:
    """Images of any size that stay on disk: the rows `rows` (n,) of a reader."""

    reader: Reader
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels int64 (n,)."""
        return self.reader.labels[self.rows]

    def take(self, index: npt.NDArray[np.int64]) -> "Files":
        """The samples at `index`."""
        return Files(reader=self.reader, rows=self.rows[index])

    def read(self, index: int, fit: Fit = _as_it_is) -> Image.Image:
        """The picture at `index`, through `fit`, as RGB. Raises DataError with its name if it cannot be decoded."""
        return _decode(self.reader, int(self.rows[index]), fit)

    def content(self) -> bytes:
        """The labels alone: to read all pixels of a large data set would take longer than it is worth."""
        return _bytes_of(self.labels)


Images = Split | Files


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set as a run sees it. `mean` and `std` are a channel's, in units of the 0..1 range."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    test_split: str = "test"
    """What the data set itself calls the split that is evaluated once, at the end."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the content of train and test."""
        digest = hashlib.sha256(self.train.content())
        digest.update(self.test.content())
        return digest.hexdigest()


def load_dataset(name: str, source: str | Path | None = None, *, in_memory: bool = True) -> Dataset:
    """Load a data set from `source`: a folder (or the one above it, where it is called `name`), or hub:OWNER/NAME.

    `digits` needs no source. In memory, mean and std are those of the train split; else 0.5 each. Raises DataError.
    """
    if name == "digits":
        return _load_digits()
    hint = _WHERE_TO_GET.get(name, _ANY_LAYOUT)
    if source is None:
        raise DataError(f"data set {name!r} needs --data DIR (or STRIDEVIT_DATA): {hint}")
    place = str(source)
    if not place.startswith(HUB) and (Path(place) / name).is_dir():
        place = str(Path(place) / name)
    train, test = open_split(place, TRAIN, hint=hint), open_split(place, EVALUATION, hint=hint)
    if test.classes and train.classes != test.classes:
        raise DataError(f"{place}: {train.split} and {test.split} have different classes")
    classes = train.classes or tuple(map(str, range(int(train.labels.max()) + 1)))
    for reader in (train, test):
        _check_labels(reader, classes)
    if in_memory:
        return _in_memory_dataset(name, classes, _load(train), _load(test), test.split)
    return Dataset(
        name=name,
        classes=classes,
        train=Files(reader=train, rows=np.arange(len(train.labels))),
        test=Files(reader=test, rows=np.arange(len(test.labels))),
        test_split=test.split,
        mean=IMAGENET_INCEPTION_MEAN,
        std=IMAGENET_INCEPTION_STD,
    )


def split_val(train: Images, size: int) -> tuple[Images, Images]:
    """Split `train` into (fit, held out), `size` images stratified by class in the second. The same for every seed."""
    classes = len(np.unique(train.labels))
    if size and not classes <= size <= len(train) - classes:
        raise DataError(
            f"val_images={size} cannot be stratified: with {classes} classes and {len(train)} train images, set it to "
            f"0 or to {classes} and more"
        )
    if size == 0:
        return train, train.take(np.empty(0, dtype=np.int64))
    fit, held = train_test_split(np.arange(len(train)), test_size=size, random_state=_SPLIT_SEED, stratify=train.labels)
    return train.take(np.sort(fit)), train.take(np.sort(held))


def _check_labels(reader: Reader, classes: tuple[str, ...]) -> None:
    if wrong := np.flatnonzero((reader.labels < 0) | (reader.labels >= len(classes))).tolist():
        raise DataError(
            f"{reader.where(wrong[0])}: label {reader.labels[wrong[0]]} of {len(classes)} classes "
            f"({len(wrong)} such in {reader.split})"
        )


def _bytes_of(labels: npt.NDArray[np.int64]) -> bytes:
    return labels.astype("<i8").tobytes()


def _decode(reader: Reader, row: int, fit: Fit = _as_it_is) -> Image.Image:
    try:
        return decode(reader.encoded(row), fit)
    except Exception as error:  # hostile files make Pillow raise almost anything
        raise DataError(f"{reader.where(row)}: the image cannot be decoded ({error})") from error


def _load(reader: Reader) -> Split:
    images = [np.asarray(_decode(reader, row)) for row in range(len(reader.labels))]
    for row, image in enumerate(images):
        if image.shape != images[0].shape:
            size, first = (f"{i.shape[1]} × {i.shape[0]}" for i in (image, images[0]))
            raise DataError(
                f"{reader.where(row)} is {size}, but the first image {first}: images of several sizes cannot be held "
                "in memory; choose a recipe with --set augment.scale=[0.05,1]"
            )
    return Split(images=np.stack(images), labels=reader.labels)


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
    return _in_memory_dataset("digits", tuple("0123456789"), everything.take(train), everything.take(test), "test")


def _in_memory_dataset(name: str, classes: tuple[str, ...], train: Split, test: Split, test_split: str) -> Dataset:
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
        test_split=test_split,
        mean=(round(float(mean[0]), 5), round(float(mean[1]), 5), round(float(mean[2]), 5)),
        std=(round(float(std[0]), 5), round(float(std[1]), 5), round(float(std[2]), 5)),
    )
