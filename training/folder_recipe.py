"""The recipe `folder`: all settings derived from the data, for the user's own pictures.

stridevit train --data photos/ --variant csra-r2

Small pictures of one size (icons, CIFAR-like) are held in memory and cropped with padding; others are read from disk
and cropped by area. The numbers are rules of thumb, not tuned on any data: about 50,000 pictures are seen, in at least
10 and at most 100 epochs. A model that starts from random weights learns little from a few hundred pictures: use
--init.
"""

import io
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.data import DIGITS, Dataset, Files, held_out_size
from training.models import PRESETS, Architecture
from training.readers import HUB, DataError
from training.recipes import Augment, Optim, Recipe, Schedule

NAME = "folder"
SMALL = 64
"""Pixels: pictures whose shorter side is smaller get the small preset."""
_PICTURES_SEEN, _FEWEST_EPOCHS, _MOST_EPOCHS = 50_000, 10, 100
_FINE_TUNING = 0.1
"""Learning rate when starting from trained weights, as a share of that for random ones."""
_MOST_READ = 20_000


def dataset_name(source: str) -> str:
    """The name of a data set, derived from that of its folder: `My Photos/` gives my-photos."""
    last = (
        source.removeprefix(HUB).rstrip("/").rpartition("/")[2]
        if source.startswith(HUB)
        else Path(source).resolve().name
    )
    name = slug(last, otherwise="pictures")
    return f"my-{name}" if name == DIGITS else name


def slug(text: str, *, otherwise: str) -> str:
    """`text` in lower case, with hyphens for characters that a name cannot hold; `otherwise` if nothing is left."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or otherwise


def folder_recipe(
    dataset: Dataset,
    like: Architecture | None = None,
    *,
    preset: str | None = None,
    trained: bool = False,
    bf16: bool = True,
) -> Recipe:
    """Settings for `dataset`, whose images are on disk.

    The size is that of the architecture `like`, else that of `preset`, else chosen to suit the pictures. `trained`: the
    run starts from trained weights; `bf16`: the device benefits from it. Raises ValueError for an unknown preset.
    """
    if not isinstance(dataset.train, Files) or not isinstance(dataset.test, Files):
        raise TypeError("the images must be on disk")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    sides_N2 = np.concatenate([_sizes(dataset.train), _sizes(dataset.test)])
    side = int(np.median(sides_N2.min(axis=1)))
    held = held_out_size(dataset.train)
    fit = len(dataset.train) - held
    preset = preset or (like.preset if like else "") or ("vit-xs" if side < SMALL else "vit-ti16")
    known = PRESETS.get(preset, PRESETS["vit-ti16"])
    patch, largest = known.patch_size, known.img_size
    # Pictures that give fewer than 4 × 4 patches are enlarged.
    img_size = min(max(largest, SMALL - patch), side // patch * patch) if side >= 4 * patch else largest
    if like is not None and preset == like.preset:
        img_size = like.image_shape[0]
    in_memory = img_size < SMALL and bool((sides_N2 == img_size).all())
    batch = min(128, 2 ** max(0, (fit // 4).bit_length() - 1))
    epochs = int(np.clip(_PICTURES_SEEN // max(1, fit), _FEWEST_EPOCHS, _MOST_EPOCHS))
    rate = 1e-3 * (batch / 128) ** 0.5 * (_FINE_TUNING if trained else 1)
    return Recipe(
        name=NAME,
        preset=preset,
        dataset=dataset.name,
        img_size=img_size,
        val_images=held,
        crop_pct=1.0 if img_size < SMALL else 0.875,
        optim=Optim(lr=float(f"{rate:.1e}")),
        schedule=Schedule(epochs=epochs, batch_size=batch, warmup_epochs=round(epochs / 20, 2)),
        augment=Augment(crop_padding=img_size // 8, hflip=0.5) if in_memory else Augment(scale=(0.4, 1.0), hflip=0.5),
        precision="bf16" if bf16 else "fp32",
    )


def _sizes(images: Files) -> npt.NDArray[np.int64]:
    """Width and height (n,2), from the pictures' headers."""
    rows = np.unique(np.linspace(0, len(images) - 1, min(len(images), _MOST_READ)).round().astype(np.int64))
    sizes = []
    for row in images.rows[rows].tolist():
        try:
            with Image.open(io.BytesIO(images.reader.encoded(row))) as opened:
                sizes.append(opened.size)
        except Exception as error:  # hostile files make Pillow raise almost anything
            raise DataError(f"{images.reader.where(row)}: the image cannot be decoded ({error})") from error
    return np.asarray(sizes, dtype=np.int64)
