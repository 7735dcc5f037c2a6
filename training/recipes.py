"""Recipes: all settings of a run except the variant."""

import difflib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from timm.data.auto_augment import rand_augment_transform

from training.models import Pool, Positions, Record


class Optim(Record):
    """AdamW, with weight decay on matrices only."""

    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    clip_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this L2 norm."""
    ema_decay: NonNegativeFloat = Field(default=0.0, lt=1)
    """Evaluate and ship an exponential moving average of the weights, updated every step; 0 turns it off."""


class Schedule(Record):
    """Linear warm-up, then a half cosine to `min_lr`, both by optimiser step."""

    epochs: NonNegativeInt | Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """May end within an epoch: 0.5 is half of one. 0 evaluates the first weights."""
    batch_size: PositiveInt = 128
    """Images per optimiser step, over all processes and micro-batches."""
    accumulate: PositiveInt = 1
    """Micro-batches per step and process: more of them need less memory."""
    warmup_epochs: NonNegativeFloat = 1.0
    warmup_steps: NonNegativeInt | None = None
    """Replaces `warmup_epochs`."""
    cosine_after_warmup: bool = False
    """Start the cosine after the warm-up, as big_vision does; else at step 0, overlaid by the warm-up, as timm does."""
    min_lr: NonNegativeFloat = 1e-5


class Augment(Record):
    """Augmentation of a training image, a pure function of (seed, epoch, sample index).

    Mixup and CutMix depend on (seed, step); with both, each step draws one of them.
    """

    crop_padding: NonNegativeInt = 0
    """Pixels of zero padding on each side before a random crop back to the image size; data in memory only."""
    hflip: float = Field(default=0.0, ge=0, le=1, strict=True)
    """Probability of a flip from left to right."""
    scale: tuple[PositiveFloat, PositiveFloat] | None = None
    """Inception crop: a random part of the image, with this range of its area, resized; for data read from disk."""
    rand_augment: str | None = None
    """RandAugment by timm's name, such as rand-m10-n2-p1.0: two operations of magnitude 10, always applied."""
    mixup_alpha: NonNegativeFloat = 0.0
    """Mix each image of a batch with its neighbour by one weight per step, from Beta(alpha, alpha); 0 turns it off."""
    cutmix_alpha: NonNegativeFloat = 0.0
    """Paste one box of its neighbour into each image of a batch, with a share of area from Beta(alpha, alpha)."""

    @model_validator(mode="after")
    def _possible(self) -> "Augment":
        if self.scale and not self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {list(self.scale)} is not [smallest, largest] share of the area, at most 1")
        if self.rand_augment is not None:
            try:
                rand_augment_transform(self.rand_augment, {})
            except (AssertionError, ValueError) as error:
                raise ValueError(f"rand_augment {self.rand_augment!r} is not such as rand-m10-n2-p1.0") from error
        if self.crop_padding and (self.scale or self.rand_augment):
            raise ValueError("crop_padding goes with neither scale nor rand_augment: set it to 0")
        return self

    @property
    def in_memory(self) -> bool:
        """Whether all images are held as one uint8 array: small ones of one size, augmented one batch at a time.

        Inception crops and RandAugment work on single images of any size, which worker processes read from disk.
        """
        return self.scale is None and self.rand_augment is None


class Distill(Record):
    """What a student learns from its teacher; the weights are zero without a teacher."""

    logits: float = Field(default=0.0, ge=0, le=1)
    """Share of the classification loss that compares with the teacher's probabilities instead of the labels."""
    temperature: PositiveFloat = 1.0
    """Logits are divided by it before they are compared; more than 1 emphasises the less likely classes."""
    blocks: NonNegativeFloat = 0.0
    """Weight of the squared difference from the outputs of the teacher's blocks, as a share of their variance."""


class Fit(Record):
    """How a retrofit makes compressed attention from trained multi-head attention (docs/retrofit.md)."""

    start: Literal["activations", "weights", "seed"] = "activations"
    """Latents from the singular values of keys and values on train images, or of their weights; or at random."""
    kernel: Literal["mean", "block", "centre"] = "block"
    """C-SRA's convolution: mean of the 3×3 window, mean of its last 2×2 (blocks without overlap), or its centre."""
    constant: NonNegativeFloat = 1.0
    """Size of a constant part of the latent, as a multiple of the rest; it keeps LayerNorm from equalising lengths."""
    output: bool = True
    """Also fit the output projection, to what the teacher's attention adds to the tokens."""
    images: PositiveInt = 1024
    """Number of train images to compute keys and values on."""


class Recipe(Record):
    """All settings of a run except the variant."""

    name: str
    preset: str
    dataset: str
    """Name in tables and cards; `digits` comes with scikit-learn, all others are read from `--data`."""
    val_images: NonNegativeInt
    """Train images held out for every decision, stratified by class; the test split is used once, at the end."""
    img_size: PositiveInt | None = None
    """Image size instead of the preset's."""
    rank: PositiveInt | None = None
    """Rank of the latent instead of the preset's."""
    positions: Positions = "sincos"
    pool: Pool = "avg"
    crop_pct: float = Field(default=1.0, gt=0, le=1)
    """For evaluation: side of the central crop ÷ shorter side of the resized image (0.875 = 224 ÷ 256)."""
    optim: Optim = Optim()
    schedule: Schedule
    augment: Augment = Augment()
    distill: Distill = Distill()
    fit: Fit | None = None
    """Only for a retrofit."""
    label_smoothing: NonNegativeFloat = Field(default=0.1, lt=1)
    drop_path: NonNegativeFloat = Field(default=0.0, lt=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products; weights and optimiser stay in float32. fp16 scales the loss and needs a GPU."""
    compile: bool = False
    """Compile the step with torch.compile; needs a C++ compiler on a CPU."""
    deterministic: bool = False
    """Use torch's deterministic algorithms (slower on a GPU); runs on a CPU are deterministic anyway."""
    seed: NonNegativeInt = 0


CIFAR100_XS = Recipe(
    name="cifar100-xs",
    preset="vit-xs",
    dataset="cifar100",
    val_images=5000,
    optim=Optim(lr=2e-3),
    schedule=Schedule(epochs=20),
    augment=Augment(crop_padding=4, hflip=0.5),
    precision="bf16",
)
"""`vit-xs` on CIFAR-100: the trained models that ship with the repository.

stridevit train --recipe cifar100-xs --variant csra-r2 --data DIR --out runs/x
20 epochs, seed 0, about an hour each on one thread of a shared CPU: top-1 51.6 % (mha), 53.9 % (lsra-r2), 54.2 %
(lsra-r4), 53.7 % (csra-r2), 51.7 % (csra-r4) on the full test split; docs/results.md has the rest.
"""

CIFAR100_FULL = Recipe(
    name="cifar100-full",
    preset="vit-cifar",
    dataset="cifar100",
    val_images=5000,
    optim=Optim(lr=2e-3, ema_decay=0.998),
    schedule=Schedule(epochs=100, batch_size=512, warmup_epochs=5),
    augment=Augment(crop_padding=4, hflip=0.5, mixup_alpha=0.8, cutmix_alpha=1.0),
    drop_path=0.1,
    precision="bf16",
)
"""`vit-cifar` on CIFAR-100, 100 epochs: the experiment at full size.

stridevit train --recipe cifar100-full --variant csra-r2 --data DIR --out runs/x
Hardware: one GPU; an epoch takes 5 s on an H200 and more than four minutes on one CPU core. Run so far: `mha` in three
shorter stages (docs/results.md, "A family to choose from"). The regularisation is like DeiT's and was not tuned.
"""

IMAGENET_S16 = Recipe(
    name="imagenet-s16",
    preset="vit-s16",
    dataset="imagenet",
    val_images=12_812,
    crop_pct=0.875,
    optim=Optim(lr=1e-3, weight_decay=0.1, clip_norm=1.0),
    schedule=Schedule(epochs=90, batch_size=1024, warmup_steps=10_000, cosine_after_warmup=True, min_lr=0.0),
    augment=Augment(scale=(0.05, 1.0), hflip=0.5, rand_augment="rand-m10-n2-p1.0", mixup_alpha=0.2),
    label_smoothing=0.0,
    precision="bf16",
)
"""`vit-s16` on ImageNet-1K, 90 epochs: "Better plain ViT baselines for ImageNet-1k" (arXiv:2205.01580).

torchrun --nproc-per-node 8 -m training train --recipe imagenet-s16 --variant csra-r2 --data DIR --out runs/x
The paper's ViT-S/16 reaches 76.5 % top-1 in 90 epochs (6 h 30 on a TPU v3-8). Not run here: accuracy and time are
unknown for all variants. Evaluate at 384 px, without fine-tuning: evaluate RUN --img-size 384; train at
384 px, as the thesis did for its efficiency figures: --set img_size=384. Warm-up 10,000 steps; val_images is 1 %.
Known to differ from big_vision's vit_s16_i1k.py: no tanh layer before the head, the last norm after pooling instead
of before, and timm's RandAugment (its 15 operations and fill colour).
"""

DIGITS = Recipe(
    name="digits",
    preset="vit-xs",
    dataset="digits",
    val_images=0,
    schedule=Schedule(epochs=10, batch_size=32),
    label_smoothing=0.05,
)
"""`vit-xs` on scikit-learn's 1,797 handwritten digits: no download, about a minute per variant on two cores.

Not augmented: flips change digits.
"""

RECIPES = {recipe.name: recipe for recipe in (CIFAR100_XS, CIFAR100_FULL, IMAGENET_S16, DIGITS)}


def retrofitted(recipe: Recipe, epochs: float) -> Recipe:
    """The recipe for a retrofit of `epochs` epochs, made from the `recipe` that the teacher was trained with."""
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-retrofit",
            "schedule": recipe.schedule.model_copy(
                update={"epochs": epochs, "warmup_epochs": min(0.1, epochs / 10), "warmup_steps": None}
            ),
            "optim": recipe.optim.model_copy(update={"ema_decay": 0.0}),
            "drop_path": 0.0,
            "distill": Distill(logits=0.5, blocks=1.0),
            "fit": Fit(),
        }
    )


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe `name` with `key=value` overrides such as `optim.lr=5e-4`.

    Raises ValueError for an unknown recipe or key (naming the nearest), and for a value of the wrong type.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}{_nearest(name, RECIPES)}: one of {', '.join(RECIPES)}")
    return overridden(RECIPES[name], overrides)


def overridden(recipe: Recipe, overrides: list[str] | None) -> Recipe:
    """`recipe` with `key=value` overrides. Raises ValueError as `load_recipe` does."""
    name, values = recipe.name, recipe.model_dump()
    known = [
        f"{key}.{leaf}" if leaf else key
        for key, value in values.items()
        for leaf in (value if isinstance(value, dict) else [""])
    ]
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} has no '=': write --set optim.lr=5e-4")
        if key not in known:
            raise ValueError(f"recipe {name!r} has no key {key!r}{_nearest(key, known)}")
        section, _, leaf = key.rpartition(".")
        (values[section] if section else values)[leaf] = _parsed(value)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ValueError(f"recipe {name!r}: {problems}") from None


def _parsed(value: str) -> Any:
    """`value` parsed as JSON (numbers, true, null, [0.05, 1]), else the text itself."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _nearest(text: str, known: Iterable[str]) -> str:
    """A hint that names the known name whose last part is most similar to that of `text`."""
    by_leaf = {key.rpartition(".")[2]: key for key in known}
    close = difflib.get_close_matches(text.rpartition(".")[2], by_leaf, n=1)
    return f"; did you mean {by_leaf[close[0]]!r}?" if close else ""
