"""A run from its recipe to `final/`."""

import csv
import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from training import runs
from training.data import Dataset, Split, load_dataset
from training.distributed import World
from training.evaluate import evaluate
from training.loop import Execution, TrainingError, train
from training.recipes import Recipe, load_recipe
from training.step import use_plain_attention

ON = Execution(world=World(device=torch.device("cpu")), console=Console(quiet=True))


def pixels(dataset: Dataset) -> torch.Tensor:
    assert isinstance(dataset.test, Split)
    return torch.from_numpy(dataset.test.images)


@pytest.fixture(scope="module")
def few_digits() -> Dataset:
    digits = load_dataset("digits")
    return replace(digits, train=digits.train.take(np.arange(160)), test=digits.test.take(np.arange(50)))


def recipe(*overrides: str) -> Recipe:
    return load_recipe("digits", ["schedule.epochs=3", "val_images=32", *overrides])


def test_run_writes_its_artefacts(few_digits: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "x"
    card = train(recipe(), "lsra-r2", few_digits, out, ON)
    record = json.loads((out / "run.json").read_text())
    assert record["variant"] == "lsra-r2"
    assert record["data_fingerprint"] == few_digits.fingerprint
    assert record["recipe"]["schedule"]["epochs"] == 3
    assert record["train_seconds"] > 0
    assert {"torch", "timm", "python"} <= set(record["environment"])
    with (out / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[0]["train_loss"]) > float(rows[-1]["train_loss"])
    assert {"val_loss", "val_top1"} <= set(rows[0])
    assert list((out / "tensorboard").iterdir())
    model, read_back = runs.load_final(out)
    assert read_back == card
    again = evaluate(model, few_digits.test, card.preprocessing, num_classes=10, world=ON.world)
    assert card.accuracy
    assert (again.top1, again.top5, card.accuracy.n) == (card.accuracy.top1, card.accuracy.top5, 50)


def test_no_test_does_not_read_the_test_split(few_digits: Dataset, tmp_path: Path) -> None:
    blind = replace(few_digits, test=few_digits.test.take(np.arange(0)))
    card = train(recipe("schedule.epochs=1"), "mha", blind, tmp_path / "x", ON, test=False)
    assert card.accuracy is None


@pytest.mark.parametrize("variant", ["mha", "csra-r2"])
def test_training_attention_equals_the_finished_models(few_digits: Dataset, tmp_path: Path, variant: str) -> None:
    """The CPU trains with plain attention and a float32 convolution; what is shipped uses the fused kernel."""
    train(recipe("schedule.epochs=1"), variant, few_digits, tmp_path / "x", ON)
    fused, _ = runs.load_final(tmp_path / "x")
    plain, _ = runs.load_final(tmp_path / "x")
    use_plain_attention(plain)
    with torch.inference_mode():
        torch.testing.assert_close(plain(pixels(few_digits)), fused(pixels(few_digits)), rtol=1e-4, atol=1e-5)


def test_finished_model_is_the_moving_average(few_digits: Dataset, tmp_path: Path) -> None:
    averaging = recipe("schedule.epochs=1", "optim.ema_decay=0.9")
    train(averaging, "mha", few_digits, tmp_path / "x", ON)
    state = torch.load(tmp_path / "x" / "last.pt", weights_only=True)["stepper"]
    shipped = runs.load_final(tmp_path / "x")[0].model.state_dict()
    assert all(torch.equal(shipped[name], state["average"][name]) for name in shipped)
    assert not torch.equal(shipped["head.weight"], state["model"]["head.weight"])


def test_folder_with_a_run_is_not_overwritten(few_digits: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "x"
    one_epoch = recipe("schedule.epochs=1")
    train(one_epoch, "mha", few_digits, out, ON)
    with pytest.raises(runs.RunError, match="--resume"):
        train(one_epoch, "mha", few_digits, out, ON)
    with pytest.raises(runs.RunError, match="another recipe"):
        train(recipe("optim.lr=0.1"), "mha", few_digits, out, ON, resume=True)
    with pytest.raises(runs.RunError, match="without --resume"):
        train(one_epoch, "mha", few_digits, tmp_path / "new", ON, resume=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.batch_size=129", "exceeds the 128 train images"),
        ("schedule.accumulate=3", "cannot be divided by 1 processes × 3 micro-batches"),
        ("img_size=64", "takes 64 px images, but digits has 32 × 32"),
    ],
)
def test_wrong_sizes_are_named_with_the_fix(few_digits: Dataset, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        train(recipe(override), "mha", few_digits, tmp_path / "x", ON)


@pytest.mark.parametrize(("slowdown", "warned"), [(28.0, True), (0.6, False)])
def test_bfloat16_without_instructions_for_it_is_warned_of(
    slowdown: float, warned: bool, few_digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.bf16.bf16_slowdown", lambda _: slowdown)
    monkeypatch.setattr("training.loop.bf16_slowdown", lambda _: slowdown)
    said = StringIO()
    one_step = recipe("precision=bf16", "schedule.epochs=0.2", "schedule.warmup_steps=0")
    train(one_step, "mha", few_digits, tmp_path / "x", replace(ON, console=Console(file=said, width=200)))
    assert ("28 times slower than float32: start again with --set precision=fp32" in said.getvalue()) is warned


def test_half_precision_is_refused_on_a_cpu(few_digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        train(recipe("precision=fp16"), "mha", few_digits, tmp_path / "x", ON)


def test_micro_batches_add_up_to_the_batch(few_digits: Dataset, tmp_path: Path) -> None:
    for parts in (1, 4):
        chosen = recipe("schedule.epochs=2", f"schedule.accumulate={parts}")
        train(chosen, "csra-r2", few_digits, tmp_path / str(parts), ON)
    whole, parted = (runs.read_metrics(tmp_path / name / "metrics.csv") for name in ("1", "4"))
    for one, other in zip(whole, parted, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=2e-4)


def test_changed_weight_file_is_refused(digits_run: Path, tmp_path: Path) -> None:
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


def test_card_of_version_1_is_converted(digits_run: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_run / "final", tmp_path / "final")
    card = json.loads((tmp_path / "final" / "model.json").read_text())
    sizes = card["architecture"]
    old = {"img_size": "image_size", "embed_dim": "width", "num_heads": "heads", "num_classes": "classes"}
    card |= {"schema_version": 1, "architecture": {old.get(name, name): value for name, value in sizes.items()}}
    (tmp_path / "final" / "model.json").write_text(json.dumps(card))
    assert runs.read_card(tmp_path) == runs.read_card(digits_run)


def test_run_of_version_1_is_not_continued(digits_run: Path, tmp_path: Path) -> None:
    record = runs.read_record(digits_run)
    del record["schema_version"]
    runs.write_json(tmp_path / "run.json", record)
    with pytest.raises(runs.RunError, match=r"earlier version of training.*train it again with another --out"):
        runs.read_record(tmp_path)


def test_weights_fit_images_of_another_size(digits_run: Path) -> None:
    model, card = runs.load_final(digits_run, img_size=48)
    assert card.architecture.grid == (12, 12)
    assert (card.preprocessing.resize, card.preprocessing.crop, card.accuracy) == (48, 48, None)
    assert model(torch.zeros(2, 48, 48, 3, dtype=torch.uint8)).shape == (2, 10)
