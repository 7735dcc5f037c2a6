"""Presets, parameter counts and initial weights."""

from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_data_config

from training.models import PRESETS, NormalizedModel, StrideViT, architecture, count_macs_by_torch, count_parameters

VARIANTS = ["mha", "lsra-r2", "lsra-r4", "csra-r2", "csra-r4"]


def test_vit_s16_has_the_known_number_of_parameters() -> None:
    mha = count_parameters(StrideViT(architecture("vit-s16", "mha", num_classes=1000)))
    csra = count_parameters(StrideViT(architecture("vit-s16", "csra-r2", num_classes=1000)))
    assert mha == 21_974_632
    assert round((mha - csra) / 1e6, 1) == 3.3


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_start_equal_outside_attention_for_one_seed(variant: str) -> None:
    mha = StrideViT(architecture("vit-xs", "mha", num_classes=10), seed=3).state_dict()
    other = StrideViT(architecture("vit-xs", variant, num_classes=10), seed=3).state_dict()
    shared = [name for name in mha if ".attn." not in name]
    assert shared == [name for name in other if ".attn." not in name]
    assert all(torch.equal(mha[name], other[name]) for name in shared)


def test_initial_weights_follow_the_seed_and_nothing_else() -> None:
    spec = architecture("vit-xs", "csra-r2", num_classes=10)
    first = StrideViT(spec, seed=1).state_dict()
    torch.manual_seed(99)
    torch.rand(5)
    before = torch.random.get_rng_state()
    again = StrideViT(spec, seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before), "building a model must not draw from the global generator"
    other = StrideViT(spec, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    weights = [name for name in first if name.endswith(("proj.weight", "fc1.weight", "latent.weight", "conv.weight"))]
    assert weights
    assert not any(torch.equal(first[name], other[name]) for name in weights)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("preset", ["vit-cifar", "vit-xs"])
def test_presets_classify_uint8_images(preset: str, variant: str) -> None:
    model = StrideViT(architecture(preset, variant, num_classes=7))
    classifier = NormalizedModel(model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)).eval()
    assert classifier(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 7)


def test_images_are_normalised_by_mean_and_std() -> None:
    seen = torch.nn.Identity()
    classifier = NormalizedModel(seen, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 1.0))
    white = torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)
    torch.testing.assert_close(classifier(white)[0, :, 0, 0], torch.tensor([1.0, 1.5, 1.0]))


def test_fewer_kv_tokens_cost_fewer_macs() -> None:
    macs = {v: count_macs_by_torch(StrideViT(architecture("vit-xs", v, num_classes=100))) for v in VARIANTS}
    assert macs["csra-r4"] < macs["csra-r2"] < macs["lsra-r2"] < macs["mha"]
    # By hand: per block 4·N·D² + 2·N²·D for attention and 4·N·D² for the MLP (ratio 2), patches, and the head.
    n, d, depth = 64, 128, 6
    assert macs["mha"] == depth * (8 * n * d * d + 2 * n * n * d) + n * 48 * d + d * 100


def from_timm(name: str, **options: Any) -> StrideViT:
    model = timm.create_model(name, **options)
    assert isinstance(model, StrideViT)
    return model


@pytest.mark.parametrize("name", timm.list_models("stridevit_*"))
def test_timm_makes_every_registered_model(name: str) -> None:
    preset = "vit-" + name.split("_")[1]
    size = 2 * PRESETS[preset].patch_size
    model = from_timm(name, img_size=(size, 3 * size), num_classes=5, drop_path_rate=0.1).eval()
    assert model(torch.zeros(2, 3, size, 3 * size)).shape == (2, 5)
    assert model.spec.grid == (2, 6)
    assert resolve_data_config(model=model)["input_size"][1] == PRESETS[preset].img_size  # type: ignore[no-untyped-call]


def test_timm_knows_five_variants_of_each_preset() -> None:
    names = timm.list_models("stridevit_*")
    assert len(names) == 5 * len(PRESETS)
    assert {"stridevit_s16_mha", "stridevit_s16_csra_r2", "stridevit_cifar_lsra_r4"} <= set(names)
    assert count_parameters(timm.create_model("stridevit_s16_mha")) == 21_974_632
    assert from_timm("stridevit_s16_csra_r2", img_size=384).spec.kv_tokens == 144


def test_timm_features_and_refusals() -> None:
    features = timm.create_model("stridevit_xs_csra_r2", features_only=True)(torch.zeros(1, 3, 32, 32))
    assert [tuple(feature.shape) for feature in features] == [(1, 128, 8, 8)] * 3
    assert timm.create_model("stridevit_xs_csra_r2", num_classes=0)(torch.zeros(1, 3, 32, 32)).shape == (1, 128)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("stridevit_xs_csra_r2", pretrained=True)
    with pytest.raises(NotImplementedError, match="make the model anew"):
        from_timm("stridevit_xs_csra_r2").set_input_size((64, 64))
    with pytest.raises(ValueError, match="not a multiple of the patch size 4"):
        timm.create_model("stridevit_xs_csra_r2", img_size=30)


def test_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(ValueError, match=", ".join(PRESETS)):
        architecture("vit-xl", "mha", num_classes=10)
