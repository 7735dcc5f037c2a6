"""Recipes and their overrides."""

import pytest

from training.recipes import RECIPES, load_recipe


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_are_complete(name: str) -> None:
    assert load_recipe(name).name == name


def test_overrides_are_typed() -> None:
    recipe = load_recipe(
        "cifar100-xs", ["optim.lr=5e-4", "schedule.epochs=3", "augment.flip=false", "preset=vit-cifar"]
    )
    assert (recipe.optim.lr, recipe.schedule.epochs, recipe.augment.flip, recipe.preset) == (
        5e-4,
        3,
        False,
        "vit-cifar",
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "did you mean 'optim.lr'"),
        ("lr=1", "did you mean 'optim.lr'"),
        ("epochs=1", "did you mean 'schedule.epochs'"),
        ("optim.lr", "has no '='"),
        ("optim.lr=fast", "valid number"),
        ("schedule.epochs=0", "greater than 0"),
        ("precision=fp8", "fp32"),
    ],
)
def test_a_wrong_override_says_what_is_right(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("digits", [override])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load_recipe("digit")
