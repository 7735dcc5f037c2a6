"""Accuracy of a model over a split: as a whole, class by class, and image by image."""

import hashlib
from base64 import b64encode
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn

from training.augment import evaluation_batches
from training.data import Dataset, Images
from training.distributed import World
from training.runs import Accuracy, Correct, Preprocessing


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What a classifier makes of `n` images.

    `confusion` int64 (C,C) counts images by label (row) and first answer (column). `loss` is the mean cross-entropy;
    `top1` and `top5` are fractions of images whose label is the first, or among the first five, answers.
    """

    n: int
    loss: float
    top5: float
    confusion: Tensor
    correct: npt.NDArray[np.bool_]
    """(n,), whether the first answer is the label, in the order of the images."""

    @property
    def top1(self) -> float:
        """Share of the diagonal."""
        return int(self.confusion.diagonal().sum()) / self.n

    def by_class(self) -> list[float]:
        """Top-1 of each class; NaN for one without images."""
        return (self.confusion.diagonal() / self.confusion.sum(dim=1)).tolist()

    def worst_pairs(self, count: int) -> list[tuple[int, int, int]]:
        """The pairs (label, answer, images) that are confused most often, worst first."""
        wrong = self.confusion.clone().fill_diagonal_(0)
        values, places = wrong.flatten().sort(descending=True, stable=True)
        classes = len(wrong)
        return [
            (place // classes, place % classes, images)
            for place, images in zip(places[:count].tolist(), values[:count].tolist(), strict=True)
            if images
        ]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: Images,
    *,
    num_classes: int,
    preprocessing: Preprocessing,
    world: World,
    batch_size: int = 256,
    workers: int = 0,
) -> Evaluation:
    """Run a classifier of uint8 images over all of `images`, in float32. Leaves the model's mode as it was.

    Each process of `world` takes its share; all get the same result.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64)
    correct = torch.zeros(len(images), dtype=torch.int32)
    own = correct[world.rank :: world.size]
    done = 0
    for batch, labels in evaluation_batches(
        images,
        resize=preprocessing.resize,
        crop=preprocessing.crop,
        batch_size=batch_size,
        rank=world.rank,
        world=world.size,
        workers=workers,
    ):
        logits = model(batch.to(world.device, non_blocking=True)).float().cpu()
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(min(5, num_classes)).indices
        sums[1] += (best == labels.unsqueeze(1)).sum()
        confusion += torch.bincount(labels * num_classes + best[:, 0], minlength=num_classes * num_classes)
        own[done : done + len(labels)] = best[:, 0] == labels
        done += len(labels)
    model.train(was_training)
    loss, hits5 = world.sum(sums.to(world.device)).tolist()
    confusion = world.sum(confusion.to(world.device)).cpu().view(num_classes, num_classes)
    n = len(images)
    right = world.sum(correct.to(world.device)).cpu().numpy() > 0
    return Evaluation(n=n, loss=loss / n, top5=hits5 / n, confusion=confusion, correct=right)


def accuracy_of(result: Evaluation, dataset: Dataset) -> Accuracy:
    """What a card says of `result`, an evaluation of `dataset.test`."""
    labels = dataset.test.labels.astype("<i8").tobytes()
    return Accuracy(
        dataset=dataset.name,
        split=dataset.test_split,
        n=result.n,
        top1=result.top1,
        top5=result.top5,
        correct=Correct(
            top1=b64encode(np.packbits(result.correct).tobytes()).decode(),
            labels_sha256=hashlib.sha256(labels).hexdigest(),
        ),
    )
