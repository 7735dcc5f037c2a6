"""What is exported: the model of a finished run with its data set, or random weights for measurements."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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

CALIBRATION_IMAGES, NOISE_IMAGES = 512, 16

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """A classifier and what its bundle records about it."""

    family: str
    """Default family of the bundle."""
    classifier: NormalizedModel
    spec: Architecture
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    weights_sha256: str
    accuracy: Accuracy | None
    """Accuracy of the checkpoint on the full test split."""
    git_commit: str | None
    dataset: Dataset | None
    """None for random weights, which see noise instead of images."""

    def test_images(self, count: int) -> Pixels:
        """At most the first `count` images of the test split as model input, uint8 (n,H,W,3)."""
        if self.dataset is None:
            return self._noise(0)
        return self._prepared(self.dataset.test, np.arange(min(count, len(self.dataset.test))))

    def calibration_images(self) -> Pixels:
        """Images from a tenth of train, held out by class, as model input; for CIFAR-100 training held them out too."""
        if self.dataset is None:
            return self._noise(1)
        _, val = split_val(self.dataset.train, max(len(self.labels), len(self.dataset.train) // 10))
        return self._prepared(val, np.random.default_rng(0).permutation(len(val))[:CALIBRATION_IMAGES])

    def batches(self, images: Images, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of `images` as model input, uint8 (B,H,W,3), with their labels (B,)."""
        prepared = self.preprocessing
        return evaluation_batches(images, resize=prepared.resize, crop=prepared.crop, batch_size=size)

    def _prepared(self, images: Images, rows: npt.NDArray[np.int64]) -> Pixels:
        batch, _ = next(iter(self.batches(images.take(rows), len(rows))))
        return np.asarray(batch)

    def _noise(self, seed: int) -> Pixels:
        shape = (NOISE_IMAGES, *self.spec.image_shape, 3)
        return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def finished_run(run: Path, data: str | Path | None) -> ExportSource:
    """The model of a finished run and its data set. Raises RunError or DataError if either cannot be read."""
    classifier, card = load_final(run)
    return ExportSource(
        family=card.dataset,
        classifier=classifier,
        spec=card.architecture,
        preprocessing=Preprocessing.model_validate(card.preprocessing.model_dump()),
        labels=card.labels,
        weights_sha256=card.weights_sha256,
        accuracy=Accuracy.model_validate(card.accuracy.model_dump()) if card.accuracy else None,
        git_commit=card.git_commit,
        dataset=load_dataset(card.dataset, data, in_memory=False),
    )


def random_weights(spec: Architecture, *, seed: int = 0) -> ExportSource:
    """An untrained model whose outputs differ between images: its head is random, where training starts with zeros."""
    model = StrideViT(spec, seed=seed)
    torch.nn.init.normal_(model.get_parameter("head.weight"), std=0.05, generator=torch.Generator().manual_seed(seed))
    half = (0.5, 0.5, 0.5)
    side = spec.image_shape[0]
    return ExportSource(
        family=f"{spec.preset}-{side}-random",
        classifier=NormalizedModel(model, mean=half, std=half).eval(),
        spec=spec,
        preprocessing=Preprocessing(resize=side, crop=side, interpolation="bicubic", mean=half, std=half),
        labels=tuple(f"class {number}" for number in range(spec.num_classes)),
        weights_sha256=hashlib.sha256(save(model.state_dict())).hexdigest(),
        accuracy=None,
        git_commit=git_commit(),
        dataset=None,
    )
