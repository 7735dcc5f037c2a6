"""Augmentation is a pure function of (seed, epoch, sample index)."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.augment import InMemoryEpoch, epoch_order
from training.data import Split
from training.recipes import Augment

N, CLASSES = 24, 5
SPLIT = Split(
    images=np.random.default_rng(0).integers(0, 256, size=(N, 8, 8, 3), dtype=np.uint8),
    labels=np.arange(N) % CLASSES,
)
FULL = Augment(crop_padding=2, hflip=0.5)


def epoch(augment: Augment = FULL, *, seed: int = 0, number: int = 0) -> InMemoryEpoch:
    return InMemoryEpoch(SPLIT, augment, seed=seed, epoch=number)


@given(index=st.lists(st.integers(0, N - 1), min_size=1, max_size=10), seed=st.integers(0, 5), number=st.integers(0, 5))
def test_sample_does_not_depend_on_its_batch(index: list[int], seed: int, number: int) -> None:
    images, labels = epoch(seed=seed, number=number).batch(np.array(index))
    for row, sample in enumerate(index):
        torch.rand(1)  # The global generator must not matter.
        image, label = epoch(seed=seed, number=number).batch(np.array([sample]))
        assert torch.equal(image[0], images[row])
        assert label[0] == labels[row] == SPLIT.labels[sample]


def test_epochs_and_seeds_differ() -> None:
    everything = np.arange(N)
    pictures = [epoch(seed=s, number=e).batch(everything)[0] for s, e in ((0, 0), (0, 1), (1, 0))]
    assert not any(torch.equal(pictures[0], other) for other in pictures[1:])
    assert sorted(epoch_order(N, seed=0, epoch=0)) == list(range(N))
    assert not np.array_equal(epoch_order(N, seed=0, epoch=0), epoch_order(N, seed=0, epoch=1))


def test_without_augmentation_images_are_untouched() -> None:
    images, labels = epoch(Augment()).batch(np.arange(N))
    assert np.array_equal(images.numpy(), SPLIT.images)
    assert labels.tolist() == SPLIT.labels.tolist()


def test_crop_shifts_the_zero_padded_image() -> None:
    images, _ = epoch(Augment(crop_padding=2)).batch(np.arange(N))
    padded = np.pad(SPLIT.images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for image, source in zip(images.numpy(), padded, strict=True):
        windows = [source[top : top + 8, left : left + 8] for top in range(5) for left in range(5)]
        assert any(np.array_equal(image, window) for window in windows)


def test_about_half_of_the_images_are_flipped() -> None:
    images, _ = epoch(Augment(hflip=0.5)).batch(np.arange(N))
    flipped = [
        np.array_equal(image, source[:, ::-1]) for image, source in zip(images.numpy(), SPLIT.images, strict=True)
    ]
    kept = [np.array_equal(image, source) for image, source in zip(images.numpy(), SPLIT.images, strict=True)]
    assert sum(flipped) + sum(kept) == N
    assert 4 <= sum(flipped) <= N - 4
