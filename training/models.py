"""Presets and the model: timm's `VisionTransformer` with its attention replaced."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, field_validator
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_jax
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.attention import attention_layer
from training.variants import parse_variant


class Architecture(BaseModel):
    """Everything that fixes the shape of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    variant: str
    image_size: PositiveInt
    patch_size: PositiveInt
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    mlp_ratio: float
    rank: PositiveInt
    """Width r of the latent that keys and values are made from; unused by MHA."""
    classes: PositiveInt

    @field_validator("variant")
    @classmethod
    def _known_variant(cls, name: str) -> str:
        return str(parse_variant(name))

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (h, w)."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def kv_tokens(self) -> int:
        """Key/value tokens M of each attention layer."""
        return parse_variant(self.variant).kv_tokens(self.grid)


# preset -> (image, patch, width D, depth, heads, MLP ratio, rank)
PRESETS: dict[str, tuple[int, int, int, int, int, float, int]] = {
    "vit-s16": (224, 16, 384, 12, 6, 4.0, 16),
    "vit-cifar": (32, 4, 192, 9, 3, 2.0, 48),
    "vit-xs": (32, 4, 128, 6, 2, 2.0, 32),
}


def architecture(
    preset: str, variant: str, *, classes: int, image_size: int | None = None, rank: int | None = None
) -> Architecture:
    """The architecture of a preset with one variant. Raises ValueError for a preset that does not exist."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    default_image, patch, width, depth, heads, mlp_ratio, default_rank = PRESETS[preset]
    return Architecture(
        preset=preset,
        variant=variant,
        image_size=image_size or default_image,
        patch_size=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio,
        rank=rank or default_rank,
        classes=classes,
    )


class StrideViT(VisionTransformer):
    """timm's Vision Transformer with fixed 2-D sin-cos positions, no class token and average pooling.

    Each module draws its first weights from a generator of its own, seeded by (`seed`, module name), in the scheme of
    the original ViT (Xavier-uniform matrices, zero head). So for one seed all variants start equal outside attention.
    """

    def __init__(self, spec: Architecture, *, seed: int = 0, drop_path_rate: float = 0.0) -> None:
        self.spec = spec
        with torch.random.fork_rng(devices=[]):
            super().__init__(
                img_size=spec.image_size,
                patch_size=spec.patch_size,
                num_classes=spec.classes,
                embed_dim=spec.width,
                depth=spec.depth,
                num_heads=spec.heads,
                mlp_ratio=spec.mlp_ratio,
                class_token=False,
                global_pool="avg",
                pos_embed="none",
                weight_init="skip",
                drop_path_rate=drop_path_rate,
                attn_layer=attention_layer(parse_variant(spec.variant), grid=spec.grid, rank=spec.rank),
            )
        positions_1ND = build_sincos2d_pos_embed(list(spec.grid), dim=spec.width).unsqueeze(0)
        del self.pos_embed
        self.register_buffer("pos_embed", positions_1ND, persistent=False)
        self.init_from(seed)

    def init_from(self, seed: int) -> None:
        """Set all weights anew, as a pure function of `seed`."""
        for name, module in self.named_modules():
            with _seeded(f"{seed}/{name}"):
                if module is not self:
                    init_weights_vit_jax(module, name, needs_reset=False)


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    """Run torch's random functions from a seed made of `text`, then put the global state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True))
        yield


class Classifier(nn.Module):
    """A model that takes uint8 images, so that normalisation can neither be forgotten nor done twice.

    `mean` and `std` are in units of the 0..1 range, one value a channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1) * 255, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 images (B,H,W,3) -> logits (B,classes)."""
        pixels = (image.permute(0, 3, 1, 2).float() - self.mean) / self.std
        logits: Tensor = self.model(pixels)
        return logits


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: StrideViT) -> int:
    """Multiply-accumulates of one image, matrix products and convolutions only.

    Counted under the math attention backend: torch's counter does not see the CPU's fused attention.
    """
    image = torch.zeros(1, 3, model.spec.image_size, model.spec.image_size)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return int(counter.get_total_flops()) // 2
