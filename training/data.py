"""Data sets for a run: small images held as uint8 arrays, large ones read from disk when they are needed.

Nothing is downloaded unless `hub:OWNER/NAME` is asked for. An image that cannot be decoded is reported by name.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD

from training.folders import held_out, is_class_folder, read_folder
from training.images import Fit, decode, unchanged
from training.readers import EVALUATION, HUB, TRAIN, DataError, Reader, open_split

DIGITS = "digits"
"""scikit-learn's digits, which need no folder."""
_SPLIT_SEED = 0
"""Splits do not depend on the seed of a run, so that runs with any seed hold out the same images."""

_WHERE_TO_GET = {
    "cifar100": "get the data set uoft-cs/cifar100 from the Hugging Face hub and name the folder that holds its "
    "train-*.parquet and test-*.parquet files, or write --data hub:uoft-cs/cifar100",
    "imagenet": "name a folder with train/ and val/ and one folder per class in them (image-net.org's val archive is "
    "flat: sort it by its labels first), or write --data hub:ILSVRC/imagenet-1k after `hf auth login`",
}
_ANY_LAYOUT = (
    "name a folder with one folder per class, with such folders under train/ and val/, or with train-*.parquet or "
    "train-*.tar files and others for the test, or write --data hub:OWNER/NAME"
)


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

    def read(self, index: int, fit: Fit = unchanged) -> Image.Image:
        """The image at `index`, with `fit` applied."""
        return fit(Image.fromarray(self.images[index]))


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

    def read(self, index: int, fit: Fit = unchanged) -> Image.Image:
        """The image at `index`, with `fit` applied, as RGB. Raises DataError with its name if it cannot be decoded."""
        return _decode(self.reader, int(self.rows[index]), fit)


Images = Split | Files


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Both splits of a data set. `mean` and `std` are per channel, in units of the 0..1 range."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    test_split: str = "test"
    """The data set's own name for the split that is evaluated once, at the end."""
    mean: tuple[float, float, float] = IMAGENET_INCEPTION_MEAN
    std: tuple[float, float, float] = IMAGENET_INCEPTION_STD
    notes: tuple[str, ...] = ()
    """What was left out, to tell the user."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over train and test: the pixels, if they are in memory, and the labels."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            if isinstance(split, Split):
                digest.update(split.images.tobytes())
            digest.update(labels_as_bytes(split.labels))
        return digest.hexdigest()


def load_dataset(name: str, source: str | Path | None = None, *, in_memory: bool = True) -> Dataset:
    """Load a data set from `source`: its folder, the parent of a folder called `name`, or hub:OWNER/NAME.

    A folder without splits, DIR/CLASS/picture.jpg, is split by `training.folders`.

    `digits` needs no source. In memory, mean and std are those of the train split; else 0.5 each. Raises DataError.
    """
    if name == DIGITS:
        digits = _load_digits()
        return _with_statistics(Dataset(name=name, classes=tuple("0123456789"), train=digits[0], test=digits[1]))
    hint = _WHERE_TO_GET.get(name, _ANY_LAYOUT)
    if source is None:
        raise DataError(f"data set {name!r} needs --data DIR (or STRIDEVIT_DATA): {hint}")
    place = str(source)
    if not place.startswith(HUB) and not Path(place).is_dir():
        raise DataError(f"there is no folder {place}: {hint}")
    own = Path(place) / name
    if not place.startswith(HUB) and own.is_dir() and (_has_splits(own) or not _is_class_folder(Path(place))):
        place = str(own)
    notes: list[str] = []
    train: Reader
    test: Reader
    if not place.startswith(HUB) and _is_class_folder(Path(place)):
        train, test, report = read_folder(Path(place), decode)
        notes = report.warnings()
    else:
        train, test = (open_split(place, names, hint=hint) for names in (TRAIN, EVALUATION))
    fit, evaluation = (Files(reader=reader, rows=np.arange(len(reader.labels))) for reader in (train, test))
    dataset = Dataset(
        name=name,
        classes=_common_classes(train, test),
        train=fit,
        test=evaluation,
        test_split=test.split,
        notes=tuple(notes),
    )
    return into_memory(dataset) if in_memory else dataset


def _is_class_folder(folder: Path) -> bool:
    """Whether `folder` holds classes and no splits. A class may be called `train`."""
    return not _has_splits(folder) and is_class_folder(folder)


def _has_splits(folder: Path) -> bool:
    return is_class_folder(folder / "train") or any(
        next(folder.glob(f"{name}-*.{ending}"), None) for name in TRAIN for ending in ("parquet", "tar")
    )


def into_memory(dataset: Dataset) -> Dataset:
    """`dataset` with all its images decoded, which must have one size. Raises DataError."""
    train, test = (
        _load(images.reader) if isinstance(images, Files) else images for images in (dataset.train, dataset.test)
    )
    return _with_statistics(replace(dataset, train=train, test=test))


def split_val(train: Images, size: int) -> tuple[Images, Images]:
    """Hold out `size` images of `train`, stratified by class: (fit, val). The same images for every seed."""
    if size == 0:
        return train, train.take(np.empty(0, dtype=np.int64))
    counts = np.unique(train.labels, return_counts=True)[1]
    classes, most = len(counts), len(train) - len(counts)
    if counts.min() < 2:
        raise DataError(f"val_images={size} needs 2 train images of each class, but one has only 1: set val_images=0")
    if not classes <= size <= most:
        raise DataError(
            f"val_images={size} cannot be held out of {len(train)} train images of {classes} classes: set val_images=0 "
            f"or a number from {classes} to {most}"
        )
    fit, held = train_test_split(np.arange(len(train)), test_size=size, random_state=_SPLIT_SEED, stratify=train.labels)
    if len(np.unique(train.labels[held])) < classes:
        # Shares of rare classes round to nothing.
        held = held_out(train.labels)
        fit = np.setdiff1d(np.arange(len(train)), held)
    return train.take(np.sort(fit)), train.take(np.sort(held))


def held_out_size(train: Images) -> int:
    """Number of images in a tenth of every class, at least one per class."""
    return len(held_out(train.labels))


def labels_as_bytes(labels: npt.NDArray[np.int64]) -> bytes:
    """Class indices as little-endian int64: the input of label digests."""
    return labels.astype("<i8").tobytes()


def _common_classes(train: Reader, test: Reader) -> tuple[str, ...]:
    """The names of the classes, by default their numbers; all labels must be among them."""
    if test.classes and train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes)) or ["their order"]
        raise DataError(f"{train.split} and {test.split} have different classes: {', '.join(differing[:5])}")
    classes = train.classes or tuple(map(str, range(int(train.labels.max()) + 1)))
    for reader in (train, test):
        if wrong := np.flatnonzero((reader.labels < 0) | (reader.labels >= len(classes))).tolist():
            raise DataError(
                f"{reader.where(wrong[0])}: label {reader.labels[wrong[0]]} of {len(classes)} classes "
                f"({len(wrong)} such in {reader.split})"
            )
    return classes


def _decode(reader: Reader, row: int, fit: Fit = unchanged) -> Image.Image:
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
                "in memory; read them from disk with --set augment.crop_padding=0 --set augment.scale=[0.4,1]"
            )
    return Split(images=np.stack(images), labels=reader.labels)


def _load_digits() -> tuple[Split, Split]:
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
    return everything.take(train), everything.take(test)


def _with_statistics(dataset: Dataset) -> Dataset:
    """The data set with mean and std of its train images, if they are in memory."""
    if not isinstance(dataset.train, Split):
        return dataset
    pixels = dataset.train.images.reshape(-1, 3)
    histograms = np.stack([np.bincount(pixels[:, channel], minlength=256) for channel in range(3)]) / len(pixels)
    values = np.arange(256) / 255
    mean = histograms @ values
    std = np.sqrt(histograms @ values**2 - mean**2)
    return replace(dataset, mean=tuple(mean.round(5).tolist()), std=tuple(std.round(5).tolist()))
