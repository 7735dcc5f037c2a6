"""Accuracy, class by class and as a whole."""

import numpy as np
import pytest
import torch

from training.data import Split
from training.distributed import World
from training.evaluate import evaluate
from training.runs import Preprocessing

LABELS = np.array([0, 1, 2, 9])
RED = [0, 3, 9, 9]


class Near(torch.nn.Module):
    """Ranks classes by their distance to the red value."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return -(torch.arange(10) - image[:, 0, 0, :1].float()).abs()


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_top1_top5_classes_and_confusions_are_counted(batch_size: int) -> None:
    images = np.zeros((4, 1, 1, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = RED
    result = evaluate(
        Near(),
        Split(images=images, labels=LABELS),
        Preprocessing(resize=1, crop=1, mean=(0, 0, 0), std=(1, 1, 1)),
        num_classes=10,
        world=World(device=torch.device("cpu")),
        batch_size=batch_size,
    )
    assert (len(result.labels), result.top1, result.top5) == (4, 0.5, 0.75)
    assert result.correct.tolist() == [True, False, False, True]
    shares = result.by_class()
    assert (shares[0], shares[1], shares[2], shares[9]) == (1, 0, 0, 1)
    assert shares[5] is None
    assert sorted(result.worst_pairs(5)) == [(1, 3, 1), (2, 9, 1)]
