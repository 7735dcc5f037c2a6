"""Accuracy of a model over a split."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import nn

from training.data import Split


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean cross-entropy, and fractions of images whose label is among the first one and five answers."""

    loss: float
    top1: float
    top5: float


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, *, device: torch.device, batch_size: int = 256) -> Evaluation:
    """Run a classifier of uint8 images over all of `split`, in float32. Leaves the model's mode as it was."""
    was_training = model.training
    model.eval()
    loss, hits1, hits5 = 0.0, 0, 0
    for start in range(0, len(split), batch_size):
        batch = split.take(np.arange(start, min(start + batch_size, len(split))))
        logits = model(torch.from_numpy(batch.images).to(device)).float().cpu()
        labels = torch.from_numpy(batch.labels)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
        hits1 += int(hits[:, 0].sum())
        hits5 += int(hits.any(dim=1).sum())
    model.train(was_training)
    return Evaluation(loss=loss / len(split), top1=hits1 / len(split), top5=hits5 / len(split))
