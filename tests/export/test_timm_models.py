"""Models of timm's as bundles: a plain Vision Transformer in our form, anything else as it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from typer.testing import CliRunner

from export.__main__ import app
from export.graph import ExportError
from export.timm_models import imagenet_labels
from service.bundle import Bundle, read_bundle
from service.engine import Engine
from service.images import decode

LABELS = ("cat", "dog", "owl")


def trained(name: str, **options: Any) -> nn.Module:
    """A model of timm's with random weights that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=len(LABELS), **options).eval()
        for weight_name, weight in model.named_parameters():
            if weight.ndim > 1 or "bias" in weight_name:
                nn.init.normal_(weight, std=0.03)
    return model


def export_timm(name: str, model: nn.Module, folder: Path, *more: str) -> Bundle:
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "labels.txt").write_text("\n".join(LABELS) + "\n")
    options = ["--weights", str(folder / "model.safetensors"), "--labels", str(folder / "labels.txt")]
    command = ["timm", name, *options, "--family", "pets", "--repository", str(folder / "models"), *more]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (version,) = (folder / "models").glob("*/1")
    return read_bundle(version)


def photo(folder: Path) -> Path:
    path = folder / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, size=(6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 280), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_a_photo_gets_timms_own_answer(name: str, tmp_path: Path) -> None:
    """From the encoded file on: timm's transform and model against our preprocessing and graph."""
    model = trained(name)
    bundle = export_timm(name, model, tmp_path)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)  # type: ignore[no-untyped-call]
    path = photo(tmp_path)
    with torch.inference_mode():
        expected = model(transform(Image.open(path))[None])
    pixels = decode(path.read_bytes(), bundle.manifest.preprocessing, max_pixels=10**6)
    logits, _ = Engine(bundle.model_path).run(pixels[None])
    # Resized to 8 bits by Pillow in one case, by torchvision on Pillow in the other: equal but for rounding.
    np.testing.assert_allclose(logits, expected.numpy(), atol=2e-3 * float(expected.abs().max()) + 1e-4)


def test_a_plain_vision_transformer_is_in_our_form(tmp_path: Path) -> None:
    manifest = export_timm("vit_tiny_patch16_224", trained("vit_tiny_patch16_224"), tmp_path).manifest
    assert manifest.name == "pets-vit-tiny-patch16-224"
    assert manifest.architecture == "vit_tiny_patch16_224"
    assert manifest.attention is not None
    assert (manifest.attention.variant, manifest.attention.tokens, manifest.attention.kv_tokens) == ("mha", 197, 197)
    assert manifest.op_types["Attention"] == 12
    assert manifest.devices == ("cpu", "cuda", "tensorrt")
    assert "Shape" not in manifest.op_types


def test_another_model_has_no_attention_but_its_costs(tmp_path: Path) -> None:
    model = trained("mobilenetv3_small_050")
    manifest = export_timm("mobilenetv3_small_050", model, tmp_path).manifest
    assert manifest.attention is None
    assert manifest.params == sum(weight.numel() for weight in model.parameters())
    assert manifest.macs is not None
    assert 10e6 < manifest.macs < 40e6
    assert manifest.random_weights is False


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--labels", "two.txt"], "has 3 classes, but there are 2 labels"),
        (["--precision", "fp16"], "only our own kind of Vision Transformer"),
        (["--precision", "int8"], "int8 needs images to calibrate with"),
        (["--random-weights"], "exclude each other"),
    ],
)
def test_what_does_not_fit_is_refused(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(
        {key: tensor.contiguous() for key, tensor in trained("mobilenetv3_small_050").state_dict().items()},
        tmp_path / "model.safetensors",
    )
    Path("labels.txt").write_text("\n".join(LABELS))
    Path("two.txt").write_text("a\nb\n")
    command = ["timm", "mobilenetv3_small_050", "--weights", "model.safetensors", "--repository", "models"]
    result = CliRunner().invoke(app, [*command, *([] if "--labels" in more else ["--labels", "labels.txt"]), *more])
    assert result.exit_code == 1
    assert message in result.stderr
    assert not Path("models").exists()


def test_labels_of_imagenet_models_are_words_and_unique() -> None:
    model = timm.create_model("mobilenetv3_small_050", pretrained=False)
    words, synsets = imagenet_labels(model, "mobilenetv3_small_050")
    assert (len(words), len(set(words)), synsets[0]) == (1000, 1000, "n01440764")
    assert words[0].startswith("tench")
    with pytest.raises(ExportError, match="not ImageNet's: name a file of --labels"):
        imagenet_labels(trained("mobilenetv3_small_050"), "mine")
