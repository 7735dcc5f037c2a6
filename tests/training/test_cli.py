"""The command line: errors that name the fix, and images as files."""

import base64
import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from training.__main__ import app
from training.data import load_dataset
from training.runs import load_final


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "csra"], "lsra-rR or csra-rR"),
        (["--recipe", "digit"], "did you mean"),
        (["--set", "optim.rate=1"], "no key 'optim.rate'"),
        (["--preset", "vit-xl"], "unknown preset 'vit-xl'"),
        (["--preset", "vit-s16"], "takes 224 px images, but digits has 32"),
        (["--set", "precision=fp16", "--device", "cpu"], "fp16 needs a GPU"),
        (["--set", "val_images=5"], "set val_images=0 or a number from 10 to 1427"),
        (["--set", "val_images=1430"], "set val_images=0 or a number from 10 to 1427"),
        (["--set", "schedule.batch_size=2048"], "exceeds the 1437 train images: --set schedule.batch_size=256"),
        (["--set", "schedule.warmup_epochs=11"], "warm-up of 484 steps never"),
        (["--set", "augment.rand_augment=foo"], "such as rand-m10-n2-p1.0"),
        (["--set", "augment.scale=[0.9,0.1]"], "[smallest, largest]"),
        (["--resume", "--auto-resume"], "give one of the two"),
        (["--set", "augment.hflip=true"], "augment.hflip: Input should be a valid number"),
        (["--set", "optim.lr=fast"], "optim.lr: Input should be a valid number"),
        (["--device", "tpu9"], "unknown device"),
        (["--recipe", "cifar100-xs", "--data", "nowhere"], "uoft-cs/cifar100"),
    ],
)
def test_wrong_argument_is_one_line_that_names_the_fix(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    valid = ["--recipe", "digits", "--variant", "mha", "--out", str(tmp_path / "x")]
    result = CliRunner().invoke(app, ["train", *valid, *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = ["train", "--recipe", "digits", "--variant", "mha", "--out", str(tmp_path / "file" / "x")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert str(tmp_path / "file") in result.stderr.replace("\n", "")
    assert result.stderr.startswith("error: ")


def test_images_writes_pictures_and_their_labels(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["images", "--dataset", "digits", "--out", str(tmp_path), "--count", "5"])
    assert result.exit_code == 0
    with (tmp_path / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 5
    for row in rows:
        with Image.open(tmp_path / row["file"]) as picture:
            assert picture.size == (32, 32)
    assert all(row["label"] == row["index"] for row in rows)


def test_evaluate_repeats_the_accuracy_of_the_card(digits_run: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(digits_run), "--per-class"])
    assert result.exit_code == 0, result.stderr
    assert "on 360 test images of digits" in result.stdout
    assert "confused most often" in result.stdout
    record = json.loads(CliRunner().invoke(app, ["evaluate", str(digits_run), "--json"]).stdout)
    accuracy = load_final(digits_run)[1].accuracy
    assert accuracy
    assert (record["top1"], record["top5"], record["n"]) == (accuracy.top1, accuracy.top5, 360)
    assert [one["label"] for one in record["classes"]] == list("0123456789")
    assert sum(one["top1"] for one in record["classes"]) / 10 == pytest.approx(accuracy.top1, abs=0.01)


def test_evaluate_records_which_images_are_correct(digits_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    path = run / "final" / "model.json"
    trained = path.read_bytes()
    card = json.loads(trained)
    correct = card["accuracy"]["correct"]
    bits = np.unpackbits(np.frombuffer(base64.b64decode(correct["top1"]), dtype=np.uint8))
    assert bits[:360].sum() == round(360 * card["accuracy"]["top1"])
    assert not bits[360:].any()
    labels = load_dataset("digits").test.labels
    assert correct["labels_sha256"] == hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()

    path.write_text(json.dumps({**card, "accuracy": {**card["accuracy"], "correct": None}}))
    assert CliRunner().invoke(app, ["evaluate", str(run), "--record"]).exit_code == 0
    assert path.read_bytes() == trained

    path.write_text(json.dumps({**card, "accuracy": {**card["accuracy"], "top1": 0.5}}))
    refused = CliRunner().invoke(app, ["evaluate", str(run), "--record"])
    assert refused.exit_code == 1
    assert "nothing was recorded" in " ".join(refused.stderr.split())
    assert json.loads(path.read_text())["accuracy"]["top1"] == 0.5


def test_evaluate_refuses_data_with_other_classes(digits_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(digits_run, copy)
    card = copy / "final" / "model.json"
    card.write_text(card.read_text().replace('"0"', '"zero"'))
    result = CliRunner().invoke(app, ["evaluate", str(copy)])
    assert result.exit_code == 1
    assert "trained on other classes" in " ".join(result.stderr.split())


def test_evaluate_at_another_size_resizes_images_in_memory(digits_run: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(digits_run), "--img-size", "48"])
    assert result.exit_code == 0, result.stderr
    assert "on 360 test images" in result.stdout


def test_imagenet_recipe_runs_on_class_folders(tmp_path: Path) -> None:
    """Its whole way, at a size for tests: pictures of several sizes, augmented one by one in worker processes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6)):
        for number in range(count):
            path = tmp_path / "imagenet" / split / f"n0{number % 3}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    small = ["preset=vit-xs", "schedule.epochs=2", "schedule.batch_size=8", "schedule.warmup_steps=2", "val_images=6"]
    arguments = ["--recipe", "imagenet-s16", "--variant", "csra-r2", "--data", str(tmp_path), "--workers", "2"]
    out = tmp_path / "run"
    overrides = [word for override in small for word in ("--set", override)]
    trained = CliRunner().invoke(app, ["train", *arguments, *overrides, "--out", str(out)])
    assert trained.exit_code == 0, trained.output
    card = load_final(out)[1]
    assert card.labels == ("n00", "n01", "n02")
    assert (card.preprocessing.resize, card.preprocessing.crop) == (37, 32)
    assert card.accuracy
    assert (card.accuracy.split, card.accuracy.n) == ("val", 6)
    larger = CliRunner().invoke(app, ["evaluate", str(out), "--data", str(tmp_path), "--img-size", "48"])
    assert larger.exit_code == 0, larger.output
    assert "on 6 val images of imagenet" in larger.stdout
