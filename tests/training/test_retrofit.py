"""Compressed attention fitted to trained multi-head attention."""

import contextlib
import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import Attention
from torch import nn
from typer.testing import CliRunner

from training.__main__ import app
from training.attention import CompressedAttention, attention_layer
from training.data import load_dataset
from training.initial import SourceError, open_source
from training.models import NormalizedModel, StrideViT, architecture
from training.recipes import DIGITS, Fit, retrofitted
from training.retrofit import fit_attention, retrofit
from training.runs import load_final
from training.variants import parse_variant

DIM, HEADS, GRID = 24, 2, (4, 6)


def trained_attention() -> Attention:
    torch.manual_seed(0)
    layer = Attention(DIM, num_heads=HEADS, qkv_bias=True)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.3)
    return layer


def inputs(count: int = 64, prefix: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x_BND: torch.Tensor = torch.randn(count, prefix + GRID[0] * GRID[1], DIM, generator=generator)
    return x_BND


def compressed(variant: str, *, rank: int, prefix: int = 0) -> CompressedAttention:
    layer = attention_layer(parse_variant(variant), grid=GRID, rank=rank, prefix=prefix)
    made = layer(DIM, num_heads=HEADS)
    assert isinstance(made, CompressedAttention)
    return made


@pytest.mark.parametrize("variant", ["lsra-r1", "csra-r1"])
@pytest.mark.parametrize("prefix", [0, 1])
def test_without_compression_the_fit_gives_the_teachers_outputs(variant: str, prefix: int) -> None:
    """Of full rank and with windows of one patch, LayerNorm is all that is left of the compression."""
    teacher, student, x_BND = (
        trained_attention(),
        compressed(variant, rank=DIM + 2, prefix=prefix),
        inputs(prefix=prefix),
    )
    fit_attention(student, teacher, x_BND, x_BND, Fit(kernel="centre", constant=30.0))
    torch.testing.assert_close(student(x_BND), teacher(x_BND), atol=2e-2, rtol=0)


def test_a_large_constant_part_makes_the_norm_linear() -> None:
    teacher, x_BND = trained_attention(), inputs()
    errors = []
    for constant in (0.0, 1.0, 30.0):
        student = compressed("lsra-r1", rank=DIM + 2)
        fit_attention(student, teacher, x_BND, x_BND, Fit(constant=constant))
        errors.append((student(x_BND) - teacher(x_BND)).square().mean().item())
    assert errors == sorted(errors, reverse=True)


def slow_pooled(x_BND: torch.Tensor, variant: str, prefix: int) -> torch.Tensor:
    """The mean of each window, patch by patch."""
    kind, reduction = variant[:4], int(variant[-1])
    patches = x_BND[:, prefix:].view(len(x_BND), *GRID, DIM)
    means = []
    if kind == "csra":
        for top in range(0, GRID[0], reduction):
            for left in range(0, GRID[1], reduction):
                rows = [row for row in range(top - 1, top + 2) if 0 <= row < GRID[0]]
                columns = [column for column in range(left - 1, left + 2) if 0 <= column < GRID[1]]
                means.append(torch.stack([patches[:, r, c] for r in rows for c in columns]).mean(dim=0))
    else:
        flat = patches.flatten(1, 2)
        means = [flat[:, start : start + reduction].mean(dim=1) for start in range(0, flat.shape[1], reduction)]
    return torch.cat([x_BND[:, :prefix], torch.stack(means, dim=1)], dim=1)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("variant", ["csra-r2", "csra-r3", "lsra-r2", "lsra-r5"])
def test_keys_and_values_are_the_teachers_pooled_over_each_window(variant: str, prefix: int) -> None:
    teacher, student = trained_attention(), compressed(variant, rank=DIM + 2, prefix=prefix)
    # Neighbours are alike, as in images, so that windows at the border are not much longer than others.
    x_BND = inputs(256, prefix) * 0.2 + inputs(256, prefix).mean(dim=1, keepdim=True) * 3
    fit_attention(student, teacher, x_BND, x_BND, Fit(kernel="mean", constant=30.0))
    fitted = student.kv(student.latents(x_BND))
    wanted = slow_pooled(x_BND, variant, prefix) @ teacher.qkv.weight[DIM:].t() + teacher.qkv.bias[DIM:]
    assert (fitted - wanted).square().mean() < 0.02 * wanted.var()


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An `mha` model trained on digits for two epochs."""
    out = tmp_path_factory.mktemp("runs") / "mha"
    command = ["train", "--recipe", "digits", "--variant", "mha", "--epochs", "2", "--device", "cpu", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    return out


def difference(teacher: NormalizedModel, teacher_run: Path, variant: str, fit: Fit) -> float:
    """Mean squared difference of the logits from the teacher's on test images, before any training."""
    digits = load_dataset("digits")
    card = load_final(teacher_run)[1]
    student = StrideViT(architecture("vit-xs", variant, num_classes=10))
    retrofit(student, open_source(str(teacher_run)), teacher, fit, digits.train, card.preprocessing)
    classifier = NormalizedModel(student, mean=card.preprocessing.mean, std=card.preprocessing.std).eval()
    images = torch.from_numpy(np.asarray(digits.test.take(np.arange(100)).images))  # type: ignore[union-attr]
    with torch.inference_mode():
        return float((classifier(images) - teacher(images)).square().mean())


@pytest.mark.parametrize("variant", ["csra-r2", "lsra-r2"])
def test_each_part_of_the_fit_brings_the_student_nearer_to_its_teacher(teacher_run: Path, variant: str) -> None:
    teacher = open_source(str(teacher_run)).classifier()
    settings = (Fit(start="seed"), Fit(output=False, images=256), Fit(images=256))
    by_seed, keys_and_values, all_parts = (difference(teacher, teacher_run, variant, fit) for fit in settings)
    assert all_parts < keys_and_values < by_seed


def test_everything_outside_attention_is_the_teachers(teacher_run: Path) -> None:
    source = open_source(str(teacher_run))
    card = load_final(teacher_run)[1]
    student = StrideViT(architecture("vit-xs", "csra-r2", num_classes=10))
    digits = load_dataset("digits")
    taken = retrofit(student, source, source.classifier(), Fit(images=64), digits.train, card.preprocessing)
    assert (taken.made, taken.left) == ((), ())
    assert all("attn" in name for name in taken.fitted)
    state = student.state_dict()
    for name in taken.taken:
        torch.testing.assert_close(state[name], source.weights[name])


class StopAfter:
    """A request to stop that arrives after so many steps have asked."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    @property
    def signum(self) -> int:
        self._left -= 1
        return 0 if self._left > 0 else signal.SIGTERM


def test_a_retrofit_trains_resumes_and_is_recorded(
    teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "csra"
    command = ["retrofit", "--teacher", str(teacher_run), "--variant", "csra-r2", "--out", str(out), "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--epochs", "0.5", "--set", "fit.images=64"])
    assert result.exit_code == 0, result.stderr
    record = json.loads((out / "run.json").read_text())
    steps = (1437 // 32) / 2
    assert record["recipe"]["schedule"]["epochs"] == 0.5
    assert (
        record["teacher"]
        == record["init"]
        == {"name": str(teacher_run), "sha256": load_final(teacher_run)[1].weights_sha256}
    )
    with (out / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == [round(steps)]
    card = load_final(out)[1]
    assert (card.architecture.variant, card.epochs, card.recipe) == ("csra-r2", 0.5, "digits-retrofit")
    # Stopped after 10 of 22 steps, and resumed: the same weights.
    half = tmp_path / "half"
    where = [str(half) if word == str(out) else word for word in command]
    options = ["--epochs", "0.5", "--set", "fit.images=64"]
    with monkeypatch.context() as patched:
        patched.setattr("training.loop.stop_requests", lambda: contextlib.nullcontext(StopAfter(10)))
        stopped = CliRunner().invoke(app, [*where, *options])
    assert stopped.exit_code == 128 + signal.SIGTERM, stopped.stderr
    resumed = CliRunner().invoke(app, [*where, *options, "--resume"])
    assert "at step 10 of 22" in resumed.stderr
    assert load_final(half)[1].weights_sha256 == card.weights_sha256
    again = CliRunner().invoke(app, [*command, "--epochs", "0.5", "--set", "fit.images=64", "--resume"])
    assert again.exit_code == 0, again.stderr
    assert load_final(out)[1].weights_sha256 == card.weights_sha256
    other = CliRunner().invoke(app, [*command, "--epochs", "0.5", "--resume"])
    assert other.exit_code == 1
    assert "trained with another recipe" in other.stderr


def test_no_epochs_only_fit_and_evaluate(teacher_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "fitted"
    command = ["retrofit", "--teacher", str(teacher_run), "--variant", "lsra-r2", "--epochs", "0", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--set", "val_images=100", "--set", "fit.images=64", "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    with (out / "metrics.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert (row["epoch"], row["step"]) == ("0", "0")
    assert float(row["val_top1"]) > 0
    card = load_final(out)[1]
    assert card.accuracy is not None
    assert card.epochs == 0


def test_a_study_of_retrofits_gives_each_seed_its_teacher(teacher_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mha-s3").symlink_to(teacher_run)
    command = ["study", "--recipe", "digits", "--teacher", str(tmp_path / "mha-s{seed}"), "--variants", "csra-r4"]
    options = [
        "--seeds",
        "3",
        "--epochs",
        "0",
        "--set",
        "fit.images=64",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "runs"),
    ]
    for _ in range(2):
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code == 0, result.stderr
        assert "csra-r4" in result.stdout
    record = json.loads((tmp_path / "runs" / "digits-retrofit-e0-csra-r4-s3" / "run.json").read_text())
    assert record["teacher"]["name"].endswith("mha-s3")
    assert record["seed"] == 3


def test_what_cannot_be_retrofitted_is_refused(digits_run: Path, teacher_run: Path, tmp_path: Path) -> None:
    source = open_source(str(digits_run))
    card = load_final(digits_run)[1]
    digits = load_dataset("digits")
    student = StrideViT(architecture("vit-xs", "csra-r4", num_classes=10))
    with pytest.raises(SourceError, match="is no trained multi-head attention"):
        retrofit(student, source, source.classifier(), Fit(), digits.train, card.preprocessing)
    wide = StrideViT(architecture("vit-cifar", "csra-r4", num_classes=10))
    source = open_source(str(teacher_run))
    with pytest.raises(SourceError, match="differs from the student in embed_dim, depth, num_heads"):
        retrofit(wide, source, source.classifier(), Fit(), digits.train, card.preprocessing)


def test_a_teacher_of_other_classes_is_refused(teacher_run: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in "abcdefghij":
        (photos / name).mkdir(parents=True)
        for row in range(4):
            Image.new("RGB", (32, 32), (row, ord(name), 0)).save(photos / name / f"{row}.png")
    command = ["retrofit", "--teacher", str(teacher_run), "--variant", "csra-r2", "--recipe", "folder"]
    result = CliRunner().invoke(app, [*command, "--data", str(photos), "--out", str(tmp_path / "x")])
    assert result.exit_code == 1
    assert "knows other classes (10, from '0') than the data has (10, from 'a')" in result.stderr.replace("\n", " ")


def test_the_recipe_of_a_retrofit_is_its_teachers_with_distillation() -> None:
    recipe = retrofitted(DIGITS, 2)
    assert (recipe.name, recipe.schedule.epochs) == ("digits-retrofit", 2)
    assert recipe.fit is not None
    assert recipe.distill.logits > 0
    assert recipe.augment == DIGITS.augment
