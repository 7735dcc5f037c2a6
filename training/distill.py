"""Learning from a teacher: its probabilities instead of labels, and the outputs of its blocks.

The classification loss is (1-a)·CE(labels) + a·T²·KL(teacher/T ‖ student/T), with a = `distill.logits` and
T = `distill.temperature` (Hinton, Vinyals, Dean: arXiv:1503.02531). Added to it is b times the mean over blocks of
|student − teacher|² ÷ the variance of the teacher's output, with b = `distill.blocks` (FitNets, arXiv:1412.6550).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor

from training.models import NormalizedModel, StrideViT
from training.recipes import Distill

Outputs = tuple[Tensor, list[Tensor]]
"""Logits (B,C), and the output (B,N,D) of each block if blocks are compared."""


class Teacher:
    """A trained model that others learn from; it is never changed. Raises ValueError if it cannot teach `student`."""

    def __init__(self, classifier: NormalizedModel, distill: Distill, student: StrideViT) -> None:
        model = classifier.model
        assert isinstance(model, StrideViT)  # noqa: S101 (a Source makes no other)
        if distill == Distill(temperature=distill.temperature):
            raise ValueError("a teacher has no effect without --set distill.logits=0.5 or --set distill.blocks=1")
        if model.spec.num_classes != student.spec.num_classes:
            raise ValueError(
                f"the teacher knows {model.spec.num_classes} classes, but the data has {student.spec.num_classes}"
            )
        if model.spec.image_shape != student.spec.image_shape:
            raise ValueError(
                f"the teacher takes images of {model.spec.img_size} px, but the student of {student.spec.img_size}"
            )
        shapes = [(spec.depth, spec.tokens, spec.embed_dim) for spec in (model.spec, student.spec)]
        if distill.blocks and shapes[0] != shapes[1]:
            raise ValueError(
                "outputs of blocks can only be compared where depth, tokens and width are equal, not "
                f"{shapes[0]} and {shapes[1]}: --set distill.blocks=0"
            )
        self.classifier = classifier.requires_grad_(requires_grad=False).eval()
        self.distill = distill

    def __call__(self, images: Tensor) -> Outputs:
        """The teacher's outputs for uint8 images, or mixed ones in float32, (B,H,W,3)."""
        with torch.no_grad():
            return outputs(self.classifier, images, blocks=self.distill.blocks > 0)

    def loss(self, student: Outputs, teacher: Outputs, label_loss: Tensor) -> Tensor:
        """Mean loss of a batch; `label_loss` is the one against the labels."""
        share, temperature = self.distill.logits, self.distill.temperature
        loss = (1 - share) * label_loss
        if share:
            own_BC, other_BC = (
                F.log_softmax(logits.float() / temperature, dim=-1) for logits in (student[0], teacher[0])
            )
            divergence = F.kl_div(own_BC, other_BC, reduction="batchmean", log_target=True)
            loss = loss + share * temperature**2 * divergence
        if self.distill.blocks:
            shares = [
                F.mse_loss(own.float(), other.float()) / other.float().var()
                for own, other in zip(student[1], teacher[1], strict=True)
            ]
            loss = loss + self.distill.blocks * torch.stack(shares).mean()
        return loss


def outputs(classifier: Callable[..., Any], images: Tensor, *, blocks: bool) -> Outputs:
    """Logits and, with `blocks`, the output of each block."""
    return classifier(images, blocks=True) if blocks else (classifier(images), [])
