"""Presets and the model: timm's `VisionTransformer` with its attention replaced.

Importing this module registers every preset with timm, as MHA and with each compression at R = 2 and 4:
`timm.create_model("stridevit_s16_csra_r2", img_size=384)`; `timm.list_models("stridevit_*")` lists them.
"""

import math
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import build_sincos2d_pos_embed, resample_abs_pos_embed, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_jax
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training import seeding
from training.attention import attention_layer
from training.variants import REGISTERED, parse_variant

ImageSize = PositiveInt | tuple[PositiveInt, PositiveInt]
"""Pixels: one number for a square, else (height, width)."""

Positions = Literal["sincos", "learned"]
"""Position embedding: fixed 2-D sines and cosines, or a weight."""
Pool = Literal["avg", "token"]
"""What the head sees: the mean over the patches, or a class token that leads the sequence."""


class Record(BaseModel):
    """An immutable record; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Architecture(Record):
    """Everything that determines the shape of a model; names as in timm."""

    preset: str
    variant: str
    img_size: ImageSize
    patch_size: PositiveInt
    embed_dim: PositiveInt
    depth: PositiveInt
    num_heads: PositiveInt
    mlp_ratio: float
    rank: PositiveInt
    """Width r of the latent that keys and values are made from; unused by MHA."""
    num_classes: NonNegativeInt
    """0 leaves the head out, as in timm."""
    positions: Positions = "sincos"
    pool: Pool = "avg"

    @field_validator("variant")
    @classmethod
    def _known_variant(cls, name: str) -> str:
        return str(parse_variant(name))

    @model_validator(mode="after")
    def _whole_patches(self) -> "Architecture":
        if any(side % self.patch_size for side in self.image_shape):
            raise ValueError(f"image size {self.img_size} is not a multiple of the patch size {self.patch_size}")
        return self

    @property
    def image_shape(self) -> tuple[int, int]:
        """Pixels (height, width)."""
        height, width = to_2tuple(self.img_size)
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (h, w)."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def class_tokens(self) -> int:
        """1 with a class token, else 0."""
        return int(self.pool == "token")

    @property
    def tokens(self) -> int:
        """Tokens N: patches, and the class token if there is one."""
        return self.grid[0] * self.grid[1] + self.class_tokens

    @property
    def kv_tokens(self) -> int:
        """Key/value tokens M of each attention layer: pooled patches, and the class token if there is one."""
        return parse_variant(self.variant).kv_tokens(self.grid) + self.class_tokens


class Preset(NamedTuple):
    """A model size; its `img_size`, `rank` and `num_classes` are defaults. Names as in timm."""

    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    rank: int
    num_classes: int


PRESETS = {
    "vit-s16": Preset(224, 16, embed_dim=384, depth=12, num_heads=6, mlp_ratio=4.0, rank=16, num_classes=1000),
    "vit-ti16": Preset(224, 16, embed_dim=192, depth=12, num_heads=3, mlp_ratio=4.0, rank=16, num_classes=1000),
    "vit-cifar": Preset(32, 4, embed_dim=192, depth=9, num_heads=3, mlp_ratio=2.0, rank=48, num_classes=100),
    "vit-xs": Preset(32, 4, embed_dim=128, depth=6, num_heads=2, mlp_ratio=2.0, rank=32, num_classes=100),
}


def architecture(
    preset: str,
    variant: str,
    *,
    num_classes: int | None = None,
    img_size: ImageSize | None = None,
    rank: int | None = None,
    positions: Positions = "sincos",
    pool: Pool = "avg",
) -> Architecture:
    """The architecture of a preset with one variant; omitted arguments are the preset's.

    Raises ValueError for an unknown preset and for an image size that is not a multiple of the patch size.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    chosen = {"num_classes": num_classes, "img_size": img_size, "rank": rank}
    sizes = PRESETS[preset]._asdict() | {name: value for name, value in chosen.items() if value is not None}
    try:
        return Architecture(preset=preset, variant=variant, positions=positions, pool=pool, **sizes)
    except ValidationError as error:
        raise ValueError("; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())) from None


class StrideViT(VisionTransformer):
    """timm's Vision Transformer with one of our kinds of attention; names of weights are timm's.

    The initial weights of each module are a function of (`seed`, module name), in the scheme of the original ViT
    (Xavier-uniform matrices, zero head). So for one seed all variants start equal outside attention.
    `timm` takes timm's own arguments that do not change the architecture: `in_chans` and the drop rates.
    """

    def __init__(self, spec: Architecture, *, seed: int = 0, drop_path_rate: float = 0.0, **timm: Any) -> None:
        self.spec = spec
        with torch.random.fork_rng(devices=[]):
            super().__init__(
                img_size=spec.image_shape,
                patch_size=spec.patch_size,
                num_classes=spec.num_classes,
                embed_dim=spec.embed_dim,
                depth=spec.depth,
                num_heads=spec.num_heads,
                mlp_ratio=spec.mlp_ratio,
                class_token=spec.pool == "token",
                global_pool=spec.pool,
                pos_embed="learn" if spec.positions == "learned" else "none",
                weight_init="skip",
                drop_path_rate=drop_path_rate,
                attn_layer=attention_layer(
                    parse_variant(spec.variant), grid=spec.grid, rank=spec.rank, prefix=spec.class_tokens
                ),
                **timm,
            )
        if spec.positions == "sincos":
            positions_ND = build_sincos2d_pos_embed(list(spec.grid), dim=spec.embed_dim)
            del self.pos_embed
            # A class token has no place in the grid.
            positions_1ND = F.pad(positions_ND, (0, 0, spec.class_tokens, 0)).unsqueeze(0)
            self.register_buffer("pos_embed", positions_1ND, persistent=False)
        self.init_from(seed)

    def forward_with_blocks(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B,num_classes), and the output (B,N,D) of each block."""
        x_BND = self._pos_embed(self.patch_embed(pixels))
        outputs = []
        for block in self.blocks:
            x_BND = block(x_BND)
            outputs.append(x_BND)
        logits: Tensor = self.forward_head(self.norm(x_BND))
        return logits, outputs

    def set_input_size(self, *_: Any, **__: Any) -> None:
        """Not supported: raises NotImplementedError. The grid of patches is part of the attention layers."""
        raise NotImplementedError("make the model anew with another image size: its weights fit any")

    def init_from(self, seed: int) -> None:
        """Initialise all weights as a pure function of `seed`."""
        with torch.random.fork_rng(devices=[]):
            for name, module in self.named_modules():
                if module is not self:
                    torch.manual_seed(seeding.name_seed(f"{seed}/{name}"))
                    init_weights_vit_jax(module, name, needs_reset=False)
            for name in ("pos_embed", "cls_token"):
                if isinstance(weight := getattr(self, name), nn.Parameter):
                    torch.manual_seed(seeding.name_seed(f"{seed}/{name}"))
                    nn.init.trunc_normal_(weight, std=0.02 if name == "pos_embed" else 1e-6)


def resized_positions(positions_1ND: Tensor, spec: Architecture, *, class_token: bool) -> Tensor:
    """Learned positions (1,N,D) for the grid of `spec`, with a first row for its class token.

    `class_token`: whether they come from a model with one. Raises ValueError if they do not form a square grid.
    """
    count = positions_1ND.shape[1]
    first = int(class_token and math.isqrt(count - 1) ** 2 == count - 1)
    if math.isqrt(count - first) ** 2 != count - first:
        raise ValueError(f"{count} learned positions are of no square grid")
    patches: Tensor = resample_abs_pos_embed(positions_1ND[:, first:], list(spec.grid), num_prefix_tokens=0)
    if not spec.class_tokens:
        return patches
    class_row = positions_1ND[:, :1] if first else torch.zeros_like(patches[:, :1])
    return torch.cat([class_row, patches], dim=1)


class NormalizedModel(nn.Module):
    """A model that takes uint8 images and normalises them itself, so that this is neither forgotten nor done twice.

    `mean` and `std` are per channel, in units of the 0..1 range.
    """

    model: nn.Module
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1) * 255, persistent=False)

    def forward(self, image: Tensor, *, blocks: bool = False) -> Any:
        """uint8 images (B,H,W,3) -> logits (B,num_classes); with `blocks` also the output of each block."""
        pixels = (image.permute(0, 3, 1, 2).float() - self.mean) / self.std
        return self.model.forward_with_blocks(pixels) if blocks else self.model(pixels)  # type: ignore[operator]


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs_by_torch(model: StrideViT) -> int:
    """Multiply-accumulates for one image, matrix products and convolutions only; describe.py's formulas must agree.

    Counted with the math attention backend: torch's counter does not see the CPU's fused attention.
    """
    image = torch.zeros(1, 3, *model.spec.image_shape)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return int(counter.get_total_flops()) // 2


_DROP_RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


def _timm_model(
    preset: str, variant: str, *, num_classes: int, img_size: ImageSize, rank: int | None = None, **options: Any
) -> StrideViT:
    if unknown := options.keys() - {"seed", "in_chans", *_DROP_RATES}:
        raise TypeError(f"a StrideViT takes no {', '.join(sorted(unknown))}: that would change its architecture")
    return StrideViT(architecture(preset, variant, num_classes=num_classes, img_size=img_size, rank=rank), **options)


def _timm_cfg(preset: str) -> dict[str, Any]:
    img_size = PRESETS[preset].img_size
    return {
        "url": "",
        "num_classes": PRESETS[preset].num_classes,
        "input_size": (3, img_size, img_size),
        "fixed_input_size": True,
        "crop_pct": 0.875 if img_size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def _register(name: str, preset: str, variant: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> StrideViT:
        model: StrideViT = build_model_with_cfg(
            partial(_timm_model, preset, variant),
            name,
            pretrained,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **kwargs,
        )
        return model

    create.__name__ = name
    create.__doc__ = f"Preset {preset} with {variant}; takes `img_size`, `num_classes`, `rank`, `seed` and drop rates."
    globals()[name] = register_model(create)


_TIMM_NAMES = {
    f"stridevit_{preset.removeprefix('vit-')}_{variant}".replace("-", "_"): (preset, variant)
    for preset, variant in product(PRESETS, REGISTERED)
}
default_cfgs = generate_default_cfgs({name: _timm_cfg(preset) for name, (preset, _) in _TIMM_NAMES.items()})
for _name, (_preset, _variant) in _TIMM_NAMES.items():
    _register(_name, _preset, _variant)
