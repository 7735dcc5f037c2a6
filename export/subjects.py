"""What is exported: a finished run, or random weights to measure with; and the images that prove the export."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor

from service.manifest import Accuracy, Preprocessing
from training.augment import evaluation_batches
from training.data import Dataset, Images, load_dataset, split_val
from training.models import Architecture, NormalizedModel, StrideViT
from training.runs import git_commit, load_final

PARITY_IMAGES, CALIBRATION_IMAGES, NOISE_IMAGES = 256, 512, 16

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A classifier and all that its bundle says of it. `family` is what it is called unless told otherwise."""

    family: str
    classifier: NormalizedModel
    spec: Architecture
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    weights: Literal["trained", "random"]
    weights_sha256: str
    accuracy: Accuracy | None
    """Of the checkpoint on the full test split."""
    git_commit: str | None
    dataset: Dataset | None
    """None for random weights: then noise stands for images."""

    def parity_images(self) -> Pixels:
        """The first images of the test split, as the model takes them, uint8 (n,H,W,3)."""
        if self.dataset is None:
            return self._noise(0)
        return self._prepared(self.dataset.test, np.arange(min(PARITY_IMAGES, len(self.dataset.test))))

    def calibration_images(self) -> Pixels:
        """Some of a tenth of train that is held out class by class: of CIFAR-100 the slice that training held out."""
        if self.dataset is None:
            return self._noise(1)
        _, val = split_val(self.dataset.train, max(len(self.labels), len(self.dataset.train) // 10))
        return self._prepared(val, np.random.default_rng(0).permutation(len(val))[:CALIBRATION_IMAGES])

    def batches(self, images: Images, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`images` as the model takes them, uint8 (B,H,W,3), and their labels (B,), `size` at a time."""
        prepared = self.preprocessing
        return evaluation_batches(images, resize=prepared.resize, crop=prepared.crop, batch_size=size)

    def _prepared(self, images: Images, rows: npt.NDArray[np.int64]) -> Pixels:
        batch, _ = next(iter(self.batches(images.take(rows), len(rows))))
        pixels: Pixels = batch.numpy()
        return pixels

    def _noise(self, seed: int) -> Pixels:
        shape = (NOISE_IMAGES, *self.spec.image_shape, 3)
        return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def finished_run(run: Path, data: str | Path | None) -> Subject:
    """The model of a finished run and its data set. Raises RunError or DataError if either cannot be read."""
    classifier, card = load_final(run)
    return Subject(
        family=card.dataset,
        classifier=classifier,
        spec=card.architecture,
        preprocessing=Preprocessing.model_validate(card.preprocessing.model_dump()),
        labels=card.labels,
        weights="trained",
        weights_sha256=card.weights_sha256,
        accuracy=Accuracy.model_validate(card.accuracy.model_dump()) if card.accuracy else None,
        git_commit=card.git_commit,
        dataset=load_dataset(card.dataset, data, in_memory=False),
    )


def random_weights(spec: Architecture, *, seed: int = 0) -> Subject:
    """An untrained model that tells images apart: the head of zeros that training starts with would not."""
    model = StrideViT(spec, seed=seed)
    torch.nn.init.normal_(model.get_parameter("head.weight"), std=0.05, generator=torch.Generator().manual_seed(seed))
    half = (0.5, 0.5, 0.5)
    side = spec.image_shape[0]
    return Subject(
        family=f"{spec.preset}-{side}-random",
        classifier=NormalizedModel(model, mean=half, std=half).eval(),
        spec=spec,
        preprocessing=Preprocessing(resize=side, crop=side, interpolation="bicubic", mean=half, std=half),
        labels=tuple(f"class {number}" for number in range(spec.num_classes)),
        weights="random",
        weights_sha256=hashlib.sha256(save(model.state_dict())).hexdigest(),
        accuracy=None,
        git_commit=git_commit(),
        dataset=None,
    )
