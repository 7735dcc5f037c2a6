"""Recipes: everything that a run is made of, apart from the variant. One short function each."""

import difflib
from collections.abc import Callable
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

DatasetName = Literal["cifar100", "digits"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Optim(_Section):
    """AdamW, with weight decay on matrices only."""

    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    clip_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this L2 norm."""


class Schedule(_Section):
    """Linear warm-up, then a half cosine to `min_lr`, both by optimiser step."""

    epochs: PositiveInt
    batch_size: PositiveInt = 128
    warmup_epochs: NonNegativeFloat = 1.0
    min_lr: NonNegativeFloat = 1e-5


class Augment(_Section):
    """What happens to a training image, as a pure function of (seed, epoch, sample index)."""

    crop_padding: NonNegativeInt = 0
    """Pixels of zero padding on each side before a random crop back to the image size."""
    flip: bool = False
    """Flip left to right with probability one half."""
    mixup_alpha: NonNegativeFloat = 0.0
    """Mix each image with another, weight drawn from Beta(alpha, alpha); 0 turns it off."""


class Recipe(_Section):
    """A complete description of a run but for its variant."""

    name: str
    preset: str
    dataset: DatasetName
    holdout: NonNegativeInt
    """Train images kept aside, stratified by class, for every decision; the test split is used once, at the end."""
    optim: Optim = Optim()
    schedule: Schedule
    augment: Augment = Augment()
    label_smoothing: NonNegativeFloat = Field(default=0.1, lt=1)
    drop_path: NonNegativeFloat = Field(default=0.0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    """Compile the step with torch.compile; needs a C++ compiler on a CPU."""
    seed: NonNegativeInt = 0


def cifar100_xs() -> Recipe:
    """`vit-xs` on CIFAR-100: the trained models that ship with the repository.

    python -m training train --recipe cifar100-xs --variant csra-r2 --data DIR --out runs/x
    For what it reaches, and in which time, see docs/results.md.
    """
    return Recipe(
        name="cifar100-xs",
        preset="vit-xs",
        dataset="cifar100",
        holdout=5000,
        optim=Optim(lr=2e-3),
        schedule=Schedule(epochs=20),
        augment=Augment(crop_padding=4, flip=True),
        precision="bf16",
    )


def digits() -> Recipe:
    """`vit-xs` on scikit-learn's 1,797 handwritten digits: no download, about a minute a variant on two cores.

    A digit that is flipped or shifted is another picture, so nothing is augmented.
    """
    return Recipe(
        name="digits",
        preset="vit-xs",
        dataset="digits",
        holdout=0,
        schedule=Schedule(epochs=10, batch_size=32),
        label_smoothing=0.05,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"cifar100-xs": cifar100_xs, "digits": digits}


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe `name` with `key=value` overrides such as `optim.lr=5e-4`.

    Raises ValueError for an unknown recipe or key (naming the nearest), and for a value of the wrong type.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}{_nearest(name, list(RECIPES))}: one of {', '.join(RECIPES)}")
    values = RECIPES[name]().model_dump()
    known = _leaf_keys(values)
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} has no '=': write --set optim.lr=5e-4")
        if key not in known:
            raise ValueError(f"recipe {name!r} has no key {key!r}{_nearest(key, known)}")
        *sections, leaf = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[leaf] = value
    return Recipe.model_validate(values)


def _leaf_keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in values.items():
        keys += _leaf_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return keys


def _nearest(text: str, known: list[str]) -> str:
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in known}
    close = difflib.get_close_matches(text, known, n=1) or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(text.rsplit(".", 1)[-1], by_leaf, n=1)
    ]
    return f"; did you mean {close[0]!r}?" if close else ""
