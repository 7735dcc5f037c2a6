"""What is exported, whatever it was made with: a classifier, its labels, its preprocessing, its data set.

`TorchSource` is a model in torch: of a finished run of ours, with random weights for measurements, or timm's
(export/timm_models.py). export/foreign.py has those from files of other exporters.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
import torch
from safetensors.torch import save
from torch import Tensor

from export.graph import ExportError, to_onnx
from export.inference_model import MLP_PARTS
from service.manifest import Accuracy, Attention, Precision, Preprocessing
from training.augment import evaluation_batches
from training.data import Dataset, Images, load_dataset, split_val
from training.describe import count_macs
from training.folder_recipe import dataset_name
from training.models import Architecture, NormalizedModel, StrideViT, count_parameters
from training.runs import git_commit, load_final
from training.variants import parse_variant

CALIBRATION_IMAGES, NOISE_IMAGES = 512, 16
EVALUATION_BATCH = 32

Pixels = npt.NDArray[np.uint8]
Outputs = npt.NDArray[np.float32]
Predict = Callable[[Pixels], tuple[Outputs, Outputs]]
"""uint8 images (n,H,W,3) -> logits and probabilities (n,classes)."""


@dataclass(frozen=True, kw_only=True)
class ExportSource(ABC):
    """A classifier and what its bundle records about it."""

    family: str
    """Default family of the bundle."""
    model: str
    """Default name of the model within its family."""
    architecture: str
    attention: Attention | None = None
    params: int
    macs: int | None = None
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    weights_sha256: str
    accuracy: Accuracy | None = None
    """Accuracy of the original on the full test split."""
    git_commit: str | None = None
    dataset: Dataset | None = None
    """Without one the model sees noise instead of images."""
    random: bool = False
    """Whether the model is untrained."""
    max_batch: int | None = None
    """Largest batch that the graph takes; None for any."""

    @abstractmethod
    def predict(self, images: Pixels) -> tuple[Outputs, Outputs]:
        """The original's logits and probabilities (n,classes) for uint8 images (n,H,W,3)."""

    @abstractmethod
    def graph(self, precision: Precision, *, opset: int) -> onnx.ModelProto:
        """The graph to serve, in float32 or float16; quantisation comes later. Raises ExportError."""

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
        return evaluation_batches(
            images,
            resize=prepared.resize,
            crop=prepared.crop,
            interpolation=prepared.interpolation,
            batch_size=size,
        )

    def _prepared(self, images: Images, rows: npt.NDArray[np.int64]) -> Pixels:
        batch, _ = next(iter(self.batches(images.take(rows), len(rows))))
        return np.asarray(batch)

    def _noise(self, seed: int) -> Pixels:
        side = self.preprocessing.crop
        shape = (NOISE_IMAGES, side, side, 3)
        return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


Source = TypeVar("Source", bound=ExportSource)


@dataclass(frozen=True, kw_only=True)
class TorchSource(ExportSource):
    """A classifier in torch: a StrideViT, which is rewritten for inference, or another model, traced as it is."""

    classifier: NormalizedModel

    def predict(self, images: Pixels) -> tuple[Outputs, Outputs]:
        """Run the model in torch."""
        with torch.inference_mode():
            logits = self.classifier(torch.tensor(images))
        return logits.numpy(), logits.softmax(dim=-1).numpy()

    def graph(self, precision: Precision, *, opset: int) -> onnx.ModelProto:
        """Export the model with torch's exporter."""
        ours = isinstance(self.classifier.model, StrideViT)
        if precision == "fp16" and not ours:
            raise ExportError("only our own kind of Vision Transformer is exported in fp16")
        parts = MLP_PARTS if precision == "fp32" else 1
        half, side = precision == "fp16", self.preprocessing.crop
        return to_onnx(self.classifier, opset=opset, half=half, mlp_parts=parts, shaped=ours, side=side)


def finished_run(run: Path, data: str | Path | None) -> TorchSource:
    """The model of a finished run and its data set.

    Raises RunError or DataError if either cannot be read, ExportError if their classes differ.
    """
    classifier, card = load_final(run)
    dataset = load_dataset(card.dataset, data, in_memory=False)
    if dataset.classes != card.labels:
        raise ExportError(
            f"{run} was trained on other classes ({len(card.labels)}, from {card.labels[0]!r}) than this data has "
            f"({len(dataset.classes)}, from {dataset.classes[0]!r}): name the data of {card.dataset} with --data"
        )
    return TorchSource(
        family=card.dataset,
        **known_facts(card.architecture, classifier),
        preprocessing=Preprocessing.model_validate(card.preprocessing.model_dump()),
        labels=card.labels,
        weights_sha256=card.weights_sha256,
        accuracy=Accuracy.model_validate(card.accuracy.model_dump()) if card.accuracy else None,
        git_commit=card.git_commit,
        dataset=dataset,
        classifier=classifier,
    )


def random_weights(spec: Architecture, *, seed: int = 0) -> TorchSource:
    """An untrained model whose outputs differ between images: its head is random, where training starts with zeros."""
    model = StrideViT(spec, seed=seed)
    torch.nn.init.normal_(model.get_parameter("head.weight"), std=0.05, generator=torch.Generator().manual_seed(seed))
    half = (0.5, 0.5, 0.5)
    height, side = spec.image_shape
    if height != side:
        raise ExportError(f"the model takes images of {side} × {height}, but the service prepares square ones only")
    classifier = NormalizedModel(model, mean=half, std=half).eval()
    return TorchSource(
        family=f"{spec.preset}-{side}-random",
        **known_facts(spec, classifier),
        preprocessing=Preprocessing(resize=side, crop=side, interpolation="bicubic", mean=half, std=half),
        labels=tuple(f"class {number}" for number in range(spec.num_classes)),
        weights_sha256=hashlib.sha256(save(model.state_dict())).hexdigest(),
        git_commit=git_commit(),
        random=True,
        classifier=classifier,
    )


def known_facts(spec: Architecture, classifier: NormalizedModel) -> dict[str, Any]:
    """The fields of a source that follow from the architecture of a StrideViT."""
    return {
        "model": spec.variant,
        "architecture": spec.preset,
        "attention": attention(spec),
        "params": count_parameters(classifier.model),
        "macs": sum(count_macs(spec).values()),
    }


def attention(spec: Architecture) -> Attention:
    """The attention of `spec` as a manifest records it."""
    variant = parse_variant(spec.variant)
    return Attention(
        variant=spec.variant,
        tokens=spec.tokens,
        kv_tokens=spec.kv_tokens,
        stride=variant.stride,
        block_size=variant.block_size,
        rank=None if variant.kind == "mha" else spec.rank,
    )


def with_data(source: Source, data: str | None, class_names: tuple[str, ...] = ()) -> Source:
    """`source` with the data set in `data`, and its accuracy on the test split; without `data`, unchanged.

    `class_names` are alternative class names that the data may use. Raises ExportError if the classes differ.
    """
    if data is None:
        return source
    dataset = load_dataset(dataset_name(data), data, in_memory=False)
    if dataset.classes not in (source.labels, class_names):
        wrong = next(
            (pair for pair in zip(dataset.classes, source.labels, strict=False) if pair[0] != pair[1]),
            (f"{len(dataset.classes)} classes", f"{len(source.labels)} labels"),
        )
        raise ExportError(f"the classes of {data} are not the labels, in their order: {wrong[0]!r} is not {wrong[1]!r}")
    return replace(source, dataset=dataset, accuracy=measure_accuracy(source, dataset, source.predict))


def measure_accuracy(source: ExportSource, dataset: Dataset, predict: Predict) -> Accuracy:
    """Accuracy of `predict` on the full test split."""
    hits, labels = [], []
    for images, label_B in source.batches(dataset.test, EVALUATION_BATCH):
        logits = torch.from_numpy(predict(images.numpy())[0])
        hits.append(logits.topk(min(5, logits.shape[1])).indices == label_B.unsqueeze(1))
        labels.append(label_B)
    hit_N5 = torch.cat(hits).numpy()
    return Accuracy.from_correct(
        hit_N5[:, 0],
        torch.cat(labels).numpy(),
        top5=int(hit_N5.sum()) / len(hit_N5),
        dataset=dataset.name,
        split=dataset.test_split,
    )
