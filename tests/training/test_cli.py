"""The command line: errors that name the fix, and images as files."""

import csv
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from training.__main__ import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "digits", "--variant", "csra"], "lsra-rR or csra-rR"),
        (["--recipe", "digit", "--variant", "mha"], "did you mean"),
        (["--recipe", "digits", "--variant", "mha", "--set", "optim.rate=1"], "no key 'optim.rate'"),
        (["--recipe", "digits", "--variant", "mha", "--preset", "vit-xl"], "unknown preset 'vit-xl'"),
        (["--recipe", "digits", "--variant", "mha", "--preset", "vit-s16"], "takes 224 px images, but digits has 32"),
        (["--recipe", "digits", "--variant", "mha", "--set", "holdout=1437"], "error: "),
        (["--recipe", "digits", "--variant", "mha", "--device", "tpu9"], "unknown device"),
        (["--recipe", "cifar100-xs", "--variant", "mha", "--data", "nowhere"], "uoft-cs/cifar100"),
    ],
)
def test_wrong_arguments_end_with_a_line_that_names_the_fix(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    result = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "x"), *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()


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
    result = CliRunner().invoke(app, ["evaluate", str(digits_run)])
    assert result.exit_code == 0, result.stderr
    assert "on 360 test images of digits" in result.stdout
