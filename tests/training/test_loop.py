"""A run from its recipe to `final/`, stopped and resumed."""

import csv
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from training import runs
from training.data import Dataset, Split, load_dataset
from training.evaluate import evaluate
from training.loop import TrainingError, train, use_plain_attention
from training.recipes import Recipe, load_recipe

CPU = torch.device("cpu")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def few_digits() -> Dataset:
    digits = load_dataset("digits")
    return Dataset(
        name="digits",
        classes=digits.classes,
        train=digits.train.take(np.arange(160)),
        test=digits.test.take(np.arange(50)),
        mean=digits.mean,
        std=digits.std,
    )


def recipe(*overrides: str) -> Recipe:
    return load_recipe("digits", ["schedule.epochs=3", "holdout=32", "drop_path=0.1", *overrides])


def test_a_run_leaves_the_artefacts_of_the_design(few_digits: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "x"
    card = train(recipe(), "lsra-r2", few_digits, out, device=CPU, console=QUIET)
    record = json.loads((out / "run.json").read_text())
    assert record["variant"] == "lsra-r2"
    assert record["data_fingerprint"] == few_digits.fingerprint()
    assert record["recipe"]["schedule"]["epochs"] == 3
    assert {"torch", "timm", "python"} <= set(record["environment"])
    with (out / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[0]["train_loss"]) > float(rows[-1]["train_loss"])
    assert {"holdout_loss", "holdout_top1"} <= set(rows[0])
    assert list((out / "tensorboard").iterdir())
    model, read_back = runs.load_final(out)
    assert read_back == card
    again = evaluate(model, few_digits.test, device=CPU)
    assert card.accuracy
    assert (again.top1, again.top5, card.accuracy.n) == (card.accuracy.top1, card.accuracy.top5, 50)


def test_a_run_that_decides_something_leaves_the_test_split_alone(few_digits: Dataset, tmp_path: Path) -> None:
    empty = Split(images=few_digits.test.images[:0], labels=few_digits.test.labels[:0])
    blind = dataclasses.replace(few_digits, test=empty)
    card = train(recipe("schedule.epochs=1"), "mha", blind, tmp_path / "x", device=CPU, test=False, console=QUIET)
    assert card.accuracy is None


@pytest.mark.parametrize("variant", ["mha", "csra-r2"])
def test_training_attends_like_the_finished_model(few_digits: Dataset, tmp_path: Path, variant: str) -> None:
    """The CPU trains with plain attention and a float32 convolution; what is shipped uses the fused kernel."""
    train(recipe("schedule.epochs=1"), variant, few_digits, tmp_path / "x", device=CPU, console=QUIET)
    fused, _ = runs.load_final(tmp_path / "x")
    plain, _ = runs.load_final(tmp_path / "x")
    use_plain_attention(plain)
    images = torch.from_numpy(few_digits.test.images)
    with torch.inference_mode():
        torch.testing.assert_close(plain(images), fused(images), rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_like_one_that_was_never_stopped(
    few_digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    chosen = recipe("augment.crop_padding=1", "augment.mixup_alpha=0.2")
    train(chosen, "csra-r2", few_digits, whole, device=CPU, console=QUIET)

    save_last = runs.save_last

    def save_then_stop(folder: Path, state: dict[str, object]) -> None:
        save_last(folder, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_last", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(chosen, "csra-r2", few_digits, stopped, device=CPU, console=QUIET)
    started = json.loads((stopped / "run.json").read_text())["started"]
    time.sleep(1.1)  # run.json counts in seconds
    train(chosen, "csra-r2", few_digits, stopped, device=CPU, console=QUIET, resume=True)

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return runs.load_final(folder)[0].state_dict()

    first, second = weights(whole), weights(stopped)
    assert all(torch.equal(first[name], second[name]) for name in first)

    def losses(folder: Path) -> list[str]:
        with (folder / "metrics.csv").open() as stream:
            return [row["train_loss"] for row in csv.DictReader(stream)]

    assert losses(whole) == losses(stopped)
    assert json.loads((stopped / "run.json").read_text())["started"] == started


def test_a_folder_with_a_run_is_not_overwritten(few_digits: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "x"
    one_epoch = recipe("schedule.epochs=1")
    train(one_epoch, "mha", few_digits, out, device=CPU, console=QUIET)
    with pytest.raises(runs.RunError, match="--resume"):
        train(one_epoch, "mha", few_digits, out, device=CPU, console=QUIET)
    with pytest.raises(runs.RunError, match="another recipe"):
        train(recipe("optim.lr=0.1"), "mha", few_digits, out, device=CPU, console=QUIET, resume=True)
    with pytest.raises(runs.RunError, match="without --resume"):
        train(one_epoch, "mha", few_digits, tmp_path / "new", device=CPU, console=QUIET, resume=True)


def test_a_run_stopped_in_its_first_epoch_can_be_started_again(
    few_digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.loop._Run.train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(), "mha", few_digits, tmp_path / "x", device=CPU, console=QUIET)
    assert not runs.can_resume(tmp_path / "x")
    train(recipe("schedule.epochs=1"), "mha", few_digits, tmp_path / "x", device=CPU, console=QUIET)


def test_a_loss_that_is_not_finite_stops_the_run(
    few_digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda *_, **__: torch.tensor(float("nan")))
    with pytest.raises(TrainingError, match=r"loss is nan in epoch 1: lower optim\.lr"):
        train(recipe(), "mha", few_digits, tmp_path / "x", device=CPU, console=QUIET)


def test_a_changed_weight_file_is_refused(digits_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    (copy / "final").mkdir(parents=True)
    for file in (digits_run / "final").iterdir():
        (copy / "final" / file.name).write_bytes(file.read_bytes())
    weights = copy / "final" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(runs.RunError, match="sha256"):
        runs.load_final(copy)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "last.pt"
    target.write_text("old")

    def write_half(path: Path) -> None:
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        runs.write_atomically(target, write_half)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_evaluation_counts_top1_and_top5() -> None:
    labels = np.array([0, 1, 2, 9])
    images = np.zeros((4, 1, 1, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = [0, 3, 9, 9]
    split = Split(images=images, labels=labels)

    class Near(torch.nn.Module):
        """Ranks classes by their distance to the red value."""

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return -(torch.arange(10) - image[:, 0, 0, :1].float()).abs()

    result = evaluate(Near(), split, device=CPU, batch_size=3)
    assert (result.top1, result.top5) == (0.5, 0.75)
