"""Accuracy of a model over a split: as a whole, class by class, and image by image."""

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from rich.markup import escape
from rich.table import Table
from torch import nn

from training.augment import evaluation_batches
from training.data import Dataset, Images, labels_as_bytes
from training.distributed import World
from training.runs import Accuracy, Correct, Preprocessing


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Predictions of a classifier for the n images of a split."""

    loss: float
    """Mean cross-entropy."""
    num_classes: int
    labels: npt.NDArray[np.int64]
    """(n,)"""
    predicted: npt.NDArray[np.int64]
    """(n, 5), or fewer columns for fewer classes: the most likely classes of each image, most likely first."""

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """(n,): whether the label is the first predicted class."""
        hits: npt.NDArray[np.bool_] = self.predicted[:, 0] == self.labels
        return hits

    @property
    def top1(self) -> float:
        """Fraction of images whose label is the first predicted class."""
        return float(self.correct.mean())

    @property
    def top5(self) -> float:
        """Fraction of images whose label is among the first five predicted classes."""
        return float((self.predicted == self.labels[:, None]).any(axis=1).mean())

    @property
    def confusion(self) -> npt.NDArray[np.int64]:
        """(C,C): number of images by label (row) and first predicted class (column)."""
        pairs = self.labels * self.num_classes + self.predicted[:, 0]
        return np.bincount(pairs, minlength=self.num_classes**2).reshape(self.num_classes, self.num_classes)

    def by_class(self) -> list[float | None]:
        """Top-1 of each class; None for a class without images."""
        confusion = self.confusion
        counts = zip(confusion.diagonal().tolist(), confusion.sum(axis=1).tolist(), strict=True)
        return [correct / images if images else None for correct, images in counts]

    def worst_pairs(self, count: int) -> list[tuple[int, int, int]]:
        """The pairs (label, predicted class, images) that are confused most often, worst first."""
        wrong = self.confusion
        np.fill_diagonal(wrong, 0)
        places = np.argsort(-wrong, axis=None, kind="stable")[:count].tolist()
        return [(*divmod(place, self.num_classes), int(wrong.flat[place])) for place in places if wrong.flat[place]]

    def accuracy(self, dataset: Dataset) -> Accuracy:
        """What a model card says about an evaluation on `dataset.test`."""
        return Accuracy(
            dataset=dataset.name,
            split=dataset.test_split,
            n=len(self.labels),
            top1=self.top1,
            top5=self.top5,
            correct=Correct(
                top1=b64encode(np.packbits(self.correct).tobytes()).decode(),
                labels_sha256=hashlib.sha256(labels_as_bytes(dataset.test.labels)).hexdigest(),
            ),
        )

    def record(self, labels: Sequence[str]) -> dict[str, Any]:
        """The evaluation as JSON."""
        return {
            "n": len(self.labels),
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "classes": [
                {"index": index, "label": label, "top1": share}
                for index, (label, share) in enumerate(zip(labels, self.by_class(), strict=True))
            ],
            "confusions": [
                {"label": labels[label], "predicted": labels[predicted], "images": images}
                for label, predicted, images in self.worst_pairs(20)
            ],
        }

    def class_table(self, labels: Sequence[str]) -> Table:
        """Top-1 of every class, worst first; classes without images last."""
        table = Table("class", "top-1")
        rows = zip(self.by_class(), labels, strict=True)
        for share, label in sorted(rows, key=lambda row: (row[0] is None, row[0] or 0, row[1])):
            table.add_row(escape(label), "no image" if share is None else f"{share:.1%}")
        return table

    def confusion_table(self, labels: Sequence[str], count: int) -> Table:
        """The `count` pairs of classes that are confused most often."""
        table = Table("label", "predicted", "images", title="confused most often")
        for label, predicted, images in self.worst_pairs(count):
            table.add_row(escape(labels[label]), escape(labels[predicted]), str(images))
        return table


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: Images,
    preprocessing: Preprocessing,
    *,
    num_classes: int,
    world: World,
    batch_size: int = 256,
    workers: int = 0,
) -> Evaluation:
    """Run a classifier of uint8 images over all of `images`, in float32. Leaves the model's mode as it was.

    Each process of `world` evaluates its share of the images; all get the same result.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64)
    predicted = torch.zeros(len(images), min(5, num_classes), dtype=torch.int64)
    own, done = predicted[world.rank :: world.size], 0
    for batch, labels in evaluation_batches(
        images,
        resize=preprocessing.resize,
        crop=preprocessing.crop,
        interpolation=preprocessing.interpolation,
        batch_size=batch_size,
        world=world,
        workers=workers,
    ):
        logits = model(batch.to(world.device, non_blocking=True)).float().cpu()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        own[done : done + len(labels)] = logits.topk(predicted.shape[1]).indices
        done += len(labels)
    model.train(was_training)
    return Evaluation(
        loss=world.sum(loss.to(world.device)).item() / len(images),
        num_classes=num_classes,
        labels=images.labels,
        predicted=world.sum(predicted.to(world.device)).cpu().numpy(),
    )
