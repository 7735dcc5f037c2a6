"""Order and augmentation as pure functions of (seed, epoch, sample index).

So all variants, a resumed run, and any number of processes see the same data, whatever batches they ask for. Images in
memory stay uint8 and are augmented a batch at a time, which costs a CPU 1 % of a training step; images on disk are
decoded and augmented one by one in worker processes.
"""

import contextlib
import os
import random
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.v2 import functional as F  # noqa: N812 (torchvision's own name for it)

from training.data import Images, Split
from training.readers import DataError
from training.recipes import Augment

Batch = tuple[Tensor, Tensor]
"""uint8 images (B,H,W,3) and int64 labels (B,)."""
Index = npt.NDArray[np.int64]


def epoch_order(size: int, *, seed: int, epoch: int) -> Index:
    """The permutation (size,) in which an epoch visits the samples."""
    return _generator(seed, epoch, 0).permutation(size)


def training_batches(
    images: Images,
    augment: Augment,
    index: Sequence[Index],
    *,
    img_size: int,
    seed: int,
    epoch: int,
    workers: int = 0,
) -> Iterator[Batch]:
    """The samples of each `index` (B,), augmented. Raises DataError with the name of an unreadable image."""
    if isinstance(images, Split) and augment.scale is None and augment.rand_augment is None:
        table = InMemoryEpoch(images, augment, seed=seed, epoch=epoch)
        return (table.batch(part) for part in index)
    return _read(_Augmented(images, augment, img_size, (seed, epoch)), index, workers)


def evaluation_batches(
    images: Images, *, resize: int, crop: int, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Every `world`-th sample from `rank` on, in order, resized and cropped at the centre."""
    rows = np.arange(rank, len(images), world)
    index = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    if isinstance(images, Split) and images.images.shape[1:3] == (crop, crop):
        return ((torch.from_numpy(images.images[i]), torch.from_numpy(images.labels[i])) for i in index)
    return _read(_Upright(images, resize, crop), index, workers)


class InMemoryEpoch:
    """One epoch's view of images in memory.

    Every random number of the epoch stands in a table with one row a sample, drawn from a generator seeded by
    (seed, epoch).
    """

    def __init__(self, split: Split, augment: Augment, *, seed: int, epoch: int) -> None:
        self._split = split
        self._padding = augment.crop_padding
        size = len(split)
        draw = _generator(seed, epoch, 1)
        self._offsets = draw.integers(0, 2 * augment.crop_padding + 1, size=(size, 2))
        self._flip = draw.random(size) < augment.hflip

    def batch(self, index: Index) -> Batch:
        """The samples at `index` (B,)."""
        images_BCHW = torch.from_numpy(self._split.images[index]).permute(0, 3, 1, 2)
        if self._padding:
            height, width = images_BCHW.shape[-2:]
            padded = F.pad(images_BCHW, [self._padding])
            images_BCHW = torch.stack(
                [
                    F.crop(image, int(top), int(left), height, width)
                    for image, (top, left) in zip(padded, self._offsets[index], strict=True)
                ]
            )
        flip = torch.from_numpy(self._flip[index])
        images_BCHW = torch.where(flip.view(-1, 1, 1, 1), F.horizontal_flip(images_BCHW), images_BCHW)
        return images_BCHW.permute(0, 2, 3, 1), torch.from_numpy(self._split.labels[index])


class _Augmented(Dataset[tuple[Tensor, int]]):
    """Pictures through timm's training transforms, one by one."""

    def __init__(self, files: Images, augment: Augment, img_size: int, key: tuple[int, ...]) -> None:
        self._files, self._labels, self._key = files, files.labels, key
        self._transform = create_transform(
            img_size,
            is_training=True,
            scale=augment.scale or (1.0, 1.0),
            hflip=augment.hflip,
            color_jitter=0.0,
            auto_augment=augment.rand_augment,
            interpolation="bicubic",
            normalize=False,
        )

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        picture = self._files.read(row)
        with _seeded(*self._key, 2, row):
            image_CHW: Tensor = self._transform(picture)
        return image_CHW.permute(1, 2, 0), int(self._labels[row])


def upright(resize: int, crop: int) -> Compose:
    """Resizes and crops a picture as the service does."""
    return Compose([Resize(resize, InterpolationMode.BICUBIC), CenterCrop(crop)])


class _Upright(Dataset[tuple[Tensor, int]]):
    """Pictures as the service prepares them."""

    def __init__(self, files: Images, resize: int, crop: int) -> None:
        self._files, self._labels = files, files.labels
        self._fit = upright(resize, crop)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        picture = self._files.read(row, self._fit)
        return torch.from_numpy(np.array(picture)), int(self._labels[row])


def _read(dataset: Dataset[tuple[Tensor, int]], index: Sequence[Index], workers: int) -> Iterator[Batch]:
    loader: DataLoader[tuple[Tensor, int]] = DataLoader(
        dataset,
        batch_sampler=[part.tolist() for part in index],
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )
    try:
        yield from loader
    except DataError as error:
        # torch puts the worker's traceback before the message.
        raise DataError(str(error).strip().rsplit("DataError: ", 1)[-1]) from None


def default_workers() -> int:
    """Processes that decode images for this one: the machine's cores by the processes that train on it, up to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


@contextlib.contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Seed every generator that transforms draw from, then put their states back."""
    python, legacy = random.getstate(), np.random.get_state()
    first, second, third = np.random.SeedSequence(key).generate_state(3).tolist()
    with torch.random.fork_rng(devices=[]):
        random.seed(first)
        np.random.seed(second)
        torch.manual_seed(third)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(key))
