"""Recipes and their overrides."""

import pytest

from training.recipes import RECIPES, load_recipe


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_are_complete(name: str) -> None:
    assert load_recipe(name).name == name


def test_overrides_are_typed() -> None:
    recipe = load_recipe("cifar100-xs", ["optim.lr=5e-4", "schedule.epochs=3", "augment.hflip=0", "preset=vit-cifar"])
    assert (recipe.optim.lr, recipe.schedule.epochs, recipe.augment.hflip, recipe.preset) == (
        5e-4,
        3,
        0,
        "vit-cifar",
    )


def test_overrides_may_be_lists_null_and_text() -> None:
    recipe = load_recipe("imagenet-s16", ["augment.scale=[0.2, 1]", "schedule.warmup_steps=null", "dataset=mine"])
    assert (recipe.augment.scale, recipe.schedule.warmup_steps, recipe.dataset) == ((0.2, 1.0), None, "mine")


def test_imagenet_recipe_follows_better_plain_vit_baselines() -> None:
    """Beyer, Zhai, Kolesnikov, arXiv:2205.01580, section 3, and vit_s16_i1k.py in google-research/big_vision."""
    recipe = load_recipe("imagenet-s16")
    schedule, augment = recipe.schedule, recipe.augment
    assert (recipe.preset, schedule.epochs, schedule.batch_size, schedule.warmup_steps) == ("vit-s16", 90, 1024, 10_000)
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.clip_norm) == (1e-3, 0.1, 1.0)
    assert (augment.scale, augment.rand_augment, augment.mixup_alpha) == ((0.05, 1.0), "rand-m10-n2-p1.0", 0.2)
    assert (augment.hflip, recipe.label_smoothing, recipe.drop_path, schedule.min_lr) == (0.5, 0, 0, 0)
    assert round(224 / recipe.crop_pct) == 256


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "did you mean 'optim.lr'"),
        ("lr=1", "did you mean 'optim.lr'"),
        ("epochs=1", "did you mean 'schedule.epochs'"),
        ("optim.lr", "has no '='"),
        ("optim.lr=fast", "valid number"),
        ("schedule.epochs=-1", "greater than or equal to 0"),
        ("precision=fp8", "fp32"),
    ],
)
def test_wrong_override_names_the_fix(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("digits", [override])


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load_recipe("digit")
