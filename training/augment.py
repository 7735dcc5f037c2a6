"""Order, augmentation and mixup as pure functions of (seed, epoch, sample index).

Every random number of an epoch stands in a table with one row a sample, drawn from a generator seeded by (seed, epoch).
So all variants, a resumed run, and any number of processes see the same data, whatever batches they ask for.
Images stay uint8 and are augmented a batch at a time, which costs 2 % of a training step on a CPU.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F  # noqa: N812 (torchvision's own name for it)

from training.data import Split
from training.recipes import Augment


class Epoch:
    """One epoch's view of a train split.

    `order` (n,) is the permutation in which the samples are visited; `batch` gives them augmented.
    """

    def __init__(self, split: Split, augment: Augment, *, classes: int, seed: int, epoch: int) -> None:
        self._split = split
        self._padding = augment.crop_padding
        self._classes = classes
        size = len(split)
        self.order = _generator(seed, epoch, 0).permutation(size)
        draw = _generator(seed, epoch, 1)
        self._offsets = draw.integers(0, 2 * augment.crop_padding + 1, size=(size, 2))
        self._flip = draw.random(size) < (0.5 if augment.flip else 0.0)
        mixup = _generator(seed, epoch, 2)
        self._mixup = augment.mixup_alpha > 0
        if self._mixup:
            self._partner = mixup.integers(0, size, size=size)
            self._weight = mixup.beta(augment.mixup_alpha, augment.mixup_alpha, size=size)

    def batch(self, index: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Samples at `index` (B,): uint8 images (B,H,W,3) and class probabilities float32 (B,C)."""
        images, targets = self._augmented(index)
        if not self._mixup:
            return images, targets
        other_images, other_targets = self._augmented(self._partner[index])
        weight = torch.from_numpy(self._weight[index]).float()
        mixed = torch.lerp(other_images.float(), images.float(), weight.view(-1, 1, 1, 1))
        return mixed.round().to(torch.uint8), torch.lerp(other_targets, targets, weight.view(-1, 1))

    def _augmented(self, index: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
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
        labels = torch.from_numpy(self._split.labels[index])
        targets = torch.nn.functional.one_hot(labels, self._classes).float()
        return images_BCHW.permute(0, 2, 3, 1), targets


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(key))
