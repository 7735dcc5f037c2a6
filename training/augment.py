"""Order and augmentation as pure functions of (seed, epoch, sample index).

All variants, a resumed run and any number of processes see the same data, whatever batches they ask for. Images in
memory stay uint8 and are augmented one batch at a time, which takes 1 % of a training step on a CPU; images on disk are
decoded and augmented one by one in worker processes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training import seeding
from training.data import Images, Split
from training.distributed import World
from training.images import Fit, resize_and_crop
from training.readers import DataError
from training.recipes import Augment

Batch = tuple[Tensor, Tensor]
"""uint8 images (B,H,W,3) and int64 labels (B,)."""
Index = npt.NDArray[np.int64]


def epoch_order(size: int, *, seed: int, epoch: int) -> Index:
    """The permutation (size,) in which an epoch visits the samples."""
    return seeding.generator(seed, epoch, 0).permutation(size)


def training_batches(
    images: Images, augment: Augment, index: Sequence[Index], *, img_size: int, seed: int, epoch: int, workers: int = 0
) -> Iterator[Batch]:
    """The samples of each `index` (B,), augmented. Raises DataError with the name of an unreadable image."""
    if isinstance(images, Split) and augment.in_memory:
        table = InMemoryEpoch(images, augment, seed=seed, epoch=epoch)
        return (table.batch(part) for part in index)
    transform = create_transform(
        img_size,
        is_training=True,
        scale=augment.scale or (1.0, 1.0),
        hflip=augment.hflip,
        color_jitter=0.0,
        auto_augment=augment.rand_augment,
        interpolation="bicubic",
        normalize=False,
    )
    return _load(_Samples(images, partial(_augmented, images, transform, (seed, epoch))), index, workers)


def evaluation_batches(
    images: Images,
    *,
    resize: int,
    crop: int,
    batch_size: int,
    interpolation: str = "bicubic",
    world: World | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """All samples, or this process's share of them, in order, resized and cropped at the centre."""
    rows = np.arange(world.rank, len(images), world.size) if world else np.arange(len(images))
    index = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    if isinstance(images, Split) and images.images.shape[1:3] == (crop, crop):
        return ((torch.from_numpy(images.images[i]), torch.from_numpy(images.labels[i])) for i in index)
    fit = resize_and_crop(resize, crop, interpolation)
    return _load(_Samples(images, partial(_fitted, images, fit)), index, workers)


class InMemoryEpoch:
    """One epoch's view of images in memory.

    All random numbers of the epoch form one table, one row per sample, drawn by a generator seeded by (seed, epoch).
    """

    def __init__(self, split: Split, augment: Augment, *, seed: int, epoch: int) -> None:
        self._split = split
        self._padding = augment.crop_padding
        size = len(split)
        draw = seeding.generator(seed, epoch, 1)
        self._offsets = draw.integers(0, 2 * augment.crop_padding + 1, size=(size, 2))
        self._flip = draw.random(size) < augment.hflip

    def batch(self, index: Index) -> Batch:
        """The samples at `index` (B,)."""
        images_BHWC = self._split.images[index]
        if self._padding:
            sides = (self._padding, self._padding)
            padded = np.pad(images_BHWC, ((0, 0), sides, sides, (0, 0)))
            windows = sliding_window_view(padded, images_BHWC.shape[1:3], axis=(1, 2))  # (B, top, left, C, H, W)
            top, left = self._offsets[index].T
            images_BHWC = windows[np.arange(len(index)), top, left].transpose(0, 2, 3, 1)
        flip = self._flip[index][:, None, None, None]
        images_BHWC = np.where(flip, images_BHWC[:, :, ::-1], images_BHWC)
        return torch.from_numpy(images_BHWC), torch.from_numpy(self._split.labels[index])


def _augmented(images: Images, transform: Callable[[Image.Image], Tensor], key: tuple[int, int], row: int) -> Tensor:
    image = images.read(row)
    with seeding.seeded(*key, 2, row):
        return transform(image).permute(1, 2, 0)


def _fitted(images: Images, fit: Fit, row: int) -> Tensor:
    return torch.from_numpy(np.array(images.read(row, fit)))


class _Samples(Dataset[tuple[Tensor, int]]):
    """Images that `pixels(row)` reads one by one, as uint8 (H,W,3), and their labels."""

    def __init__(self, images: Images, pixels: Callable[[int], Tensor]) -> None:
        self._labels, self._pixels = images.labels, pixels

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self._pixels(row), int(self._labels[row])


def _load(samples: _Samples, index: Sequence[Index], workers: int) -> Iterator[Batch]:
    loader: DataLoader[tuple[Tensor, int]] = DataLoader(
        samples,
        batch_sampler=[part.tolist() for part in index],
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        yield from loader
    except DataError as error:
        # torch puts the worker's traceback before the message.
        raise DataError(str(error).strip().rsplit("DataError: ", 1)[-1]) from None


def default_workers() -> int:
    """Worker processes per training process: the machine's cores divided among its training processes, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
