"""Beginning with trained weights: what is taken, made and left, and that equal architectures give equal outputs."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from training.__main__ import app
from training.initial import (
    SourceError,
    adapted,
    as_architecture,
    as_stridevit,
    open_source,
    take,
    timm_model,
    timm_preprocessing,
)
from training.models import Architecture, StrideViT, architecture
from training.recipes import DIGITS


def timm_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    """A model of timm's in which every weight is random, also those that start as zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, pretrained=False, **options).eval()
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.05)
    return model


def saved(model: nn.Module, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def logits(model: nn.Module, size: int = 224) -> torch.Tensor:
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out: torch.Tensor = model(pixels)
    return out


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224"])
def test_weights_of_a_timm_model_give_timms_logits(name: str, tmp_path: Path) -> None:
    model = timm_vit(name, num_classes=10)
    source = open_source(str(saved(model, tmp_path / "vit.safetensors")))
    spec = Architecture.model_validate(
        architecture("vit-s16" if "small" in name else "vit-ti16", "mha", num_classes=10).model_dump()
        | {"positions": "learned", "pool": "token"}
    )
    ours = StrideViT(spec).eval()
    taken = take(ours, source)
    assert (taken.made, taken.left, taken.fitted) == ((), (), ())
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}, {"img_size": 64, "num_classes": 7}],
    ids=["class token", "average", "class token without a position", "another size"],
)
def test_a_plain_vision_transformer_of_timms_becomes_one_of_ours(options: dict[str, Any]) -> None:
    model = timm_vit(**{"img_size": 32, **options})
    size = 64 if "img_size" in options else 32
    torch.testing.assert_close(logits(as_stridevit(model, "x"), size), logits(model, size), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("resnet18", {}, "the class ResNet"),
        ("vit_tiny_patch16_224", {"reg_tokens": 1}, "register tokens"),
        ("vit_tiny_patch16_224", {"init_values": 1e-5}, "layer scale"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "normalised queries"),
        ("vit_tiny_patch16_224", {"pre_norm": True}, "a norm before the blocks"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "the pooling avg with a class token"),
        ("vit_tiny_patch16_224", {"qkv_bias": False}, "queries without bias"),
        ("vit_tiny_patch16_224", {"act_layer": "relu"}, "another activation"),
        ("vit_tiny_patch16_224", {"norm_layer": nn.LayerNorm}, "another epsilon"),
        ("vit_tiny_patch16_224", {"num_classes": 0}, "no linear head"),
        ("vit_tiny_patch16_224", {"fc_norm": True}, "the last norm at another place"),
        ("vit_small_patch16_18x2_224", {}, "blocks of the class ParallelThingsBlock"),
    ],
)
def test_another_model_is_refused_by_what_it_has(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        as_architecture(timm.create_model(name, pretrained=False, **options), name)


def test_positions_are_resized_and_another_head_is_made_anew(tmp_path: Path) -> None:
    model = timm_vit(img_size=64)
    spec = architecture("vit-ti16", "mha", num_classes=3, img_size=96, positions="learned", pool="token")
    ours = StrideViT(spec)
    taken = take(ours, open_source(str(saved(model, tmp_path / "vit.safetensors"))))
    assert taken.fitted == ("pos_embed",)
    assert set(taken.made) == {"head.weight", "head.bias"}
    own, given = ours.get_parameter("pos_embed"), model.get_parameter("pos_embed")
    assert own.shape == (1, 1 + 36, 192)
    torch.testing.assert_close(own[:, 0], given[:, 0])
    # A constant field of positions stays one.
    with torch.no_grad():
        given[:, 1:] = 1.0
    take(ours, open_source(str(saved(model, tmp_path / "constant.safetensors"))))
    torch.testing.assert_close(own[:, 1:], torch.ones(1, 36, 192))
    assert any("made anew (2): head.weight, head.bias" in line for line in taken.lines())


def test_a_class_token_is_left_where_the_mean_is_taken(tmp_path: Path) -> None:
    model = timm_vit(img_size=64)
    spec = architecture("vit-ti16", "mha", num_classes=1000, img_size=64, positions="learned")
    ours = StrideViT(spec)
    taken = take(ours, open_source(str(saved(model, tmp_path / "vit.safetensors"))))
    assert taken.left == ("cls_token",)
    assert taken.fitted == ("pos_embed",)
    torch.testing.assert_close(ours.get_parameter("pos_embed"), model.get_parameter("pos_embed")[:, 1:])
    # timm's last norm stands before the pooling, ours after it.
    torch.testing.assert_close(ours.get_parameter("fc_norm.weight"), model.get_parameter("norm.weight"))


def test_nothing_that_fits_is_an_error(tmp_path: Path) -> None:
    source = open_source(str(saved(timm_vit(img_size=32), tmp_path / "vit.safetensors")))
    with pytest.raises(SourceError, match="choose the preset of its size"):
        take(StrideViT(architecture("vit-xs", "mha", num_classes=10)), source)


def test_other_files_and_names_are_refused_with_the_fix(tmp_path: Path) -> None:
    pickled = tmp_path / "model.pth"
    torch.save({"head.weight": torch.zeros(2)}, pickled)
    with pytest.raises(SourceError, match=r"not a safetensors file .* may run code"):
        open_source(str(pickled))
    with pytest.raises(SourceError, match="is no run, no file"):
        open_source(str(tmp_path / "missing"))
    with pytest.raises(SourceError, match=r"no model 'vit_tinny_patch16_224'|timm has no model"):
        open_source("timm:vit_tinny_patch16_224")
    other = saved(nn.Linear(2, 2), tmp_path / "other.safetensors")
    with pytest.raises(SourceError, match="does not fit timm:vit_tiny_patch16_224"):
        open_source("timm:vit_tiny_patch16_224", other)


def test_the_head_of_any_timm_model_tells_its_classes(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", pretrained=False, num_classes=7)
    assert timm_model("resnet18", saved(model, tmp_path / "resnet.safetensors")).num_classes == 7
    with pytest.raises(SourceError, match="would read a folder by itself"):
        timm_model("local-dir:somewhere")


def test_the_head_is_made_anew_for_other_labels(digits_run: Path) -> None:
    source = open_source(str(digits_run))
    assert source.architecture is not None
    other = take(StrideViT(source.architecture), source, tuple("abcdefghij"))
    assert set(other.made) == {"head.weight", "head.bias"}
    assert take(StrideViT(source.architecture), source, source.labels).made == ()


def test_positions_of_a_distilled_model_are_refused(tmp_path: Path) -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False, img_size=64)
    source = open_source(str(saved(model, tmp_path / "deit.safetensors")))
    spec = architecture("vit-ti16", "mha", num_classes=10, img_size=64, positions="learned", pool="token")
    with pytest.raises(SourceError, match="18 learned positions are of no square grid"):
        take(StrideViT(spec), source)


def test_a_run_with_learned_positions_is_evaluated_at_another_size(tmp_path: Path) -> None:
    out = tmp_path / "learned"
    command = ["train", "--recipe", "digits", "--variant", "csra-r2", "--epochs", "0.1", "--set", "positions=learned"]
    result = CliRunner().invoke(app, [*command, "--set", "pool=token", "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    evaluated = CliRunner().invoke(app, ["evaluate", str(out), "--img-size", "48"])
    assert evaluated.exit_code == 0, evaluated.stderr


def test_a_path_to_the_same_weights_continues_a_run(digits_run: Path, tmp_path: Path) -> None:
    command = ["train", "--recipe", "digits", "--variant", "csra-r2", "--epochs", "0", "--out", str(tmp_path / "x")]
    assert CliRunner().invoke(app, [*command, "--init", str(digits_run)]).exit_code == 0
    (tmp_path / "same").symlink_to(digits_run)
    again = CliRunner().invoke(app, [*command, "--init", str(tmp_path / "same"), "--resume"])
    assert again.exit_code == 0, again.stderr


def test_settings_without_effect_are_errors(tmp_path: Path) -> None:
    command = ["train", "--recipe", "digits", "--variant", "mha", "--out", str(tmp_path / "x")]
    for more, message in (
        (["--set", "distill.logits=0.5"], "no effect without a --teacher"),
        (["--weights", "x.safetensors"], "--weights are those of timm:NAME"),
        (["--epochs", "inf"], "--epochs"),
    ):
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code != 0
        assert message in result.stderr


def test_a_recipe_takes_over_sizes_and_crop_unless_told_otherwise(tmp_path: Path) -> None:
    weights = saved(timm_vit(num_classes=10), tmp_path / "vit.safetensors")
    source = open_source("timm:vit_tiny_patch16_224", weights)
    assert source.architecture is not None
    assert (source.architecture.preset, source.architecture.num_classes) == ("vit-ti16", 10)
    recipe = adapted(DIGITS, source, given={"img_size"})
    assert (recipe.preset, recipe.img_size) == ("vit-ti16", DIGITS.img_size)
    assert (recipe.positions, recipe.pool) == ("learned", "token")
    assert source.preprocessing is not None
    assert round(source.preprocessing.crop / recipe.crop_pct) == source.preprocessing.resize


def test_preprocessing_is_timms_own() -> None:
    model = timm_vit("vit_small_patch16_224")
    prepared = timm_preprocessing(model)
    assert (prepared.resize, prepared.crop, prepared.interpolation) == (248, 224, "bicubic")
    assert prepared.mean == (0.5, 0.5, 0.5)


def test_a_stage_continues_from_the_one_before(digits_run: Path, tmp_path: Path) -> None:
    command = ["train", "--recipe", "digits", "--variant", "csra-r2", "--init", str(digits_run), "--epochs", "0"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "next")])
    assert result.exit_code == 0, result.stderr
    assert "weights taken" in result.stderr
    before, after = (folder / "final" / "model.safetensors" for folder in (digits_run, tmp_path / "next"))
    assert before.read_bytes() == after.read_bytes()
