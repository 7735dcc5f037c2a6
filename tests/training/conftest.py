"""A data set that trains in a second, as class folders."""

import numpy as np
import pytest

from training.data import load_dataset


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread(one_torch_thread: None) -> None:
    """All tests here use torch."""


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of `train` and `study` for 160 of the digits to train on and 50 to test on: 8 steps per epoch."""
    folder = tmp_path_factory.mktemp("data")
    digits = load_dataset("digits")
    for name, split in (("train", digits.train.take(np.arange(160))), ("val", digits.test.take(np.arange(50)))):
        for row, label in enumerate(split.labels):
            path = folder / name / str(label) / f"{row:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            split.read(row).save(path)
    overrides = ["dataset=small", "schedule.batch_size=16", "val_images=32"]
    options = [word for override in overrides for word in ("--set", override)]
    return ["--recipe", "digits", "--data", str(folder), "--device", "cpu", *options]
