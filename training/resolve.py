"""What a command line asks for: a recipe with the user's changes, and the data for it."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from training import folder_recipe, runs
from training.bf16 import bf16_is_emulated
from training.data import Dataset, into_memory, load_dataset
from training.initial import TIMM, Source, adapted
from training.loop import Origin
from training.recipes import Recipe, load_recipe, overridden, retrofitted

DATA_VARIABLE = "STRIDEVIT_DATA"
"""The environment variable that can replace `--data`."""


def prepare(
    recipe: str, data: str | None, changes: list[str], source: Source | None, device: torch.device
) -> tuple[Recipe, Dataset]:
    """The recipe with the user's `changes`, and its data, for a run that begins with `source`.

    Raises ValueError if the two do not go together, DataError if the data cannot be read.
    """
    if recipe != folder_recipe.NAME:
        resolved = load_recipe(recipe, changes)
        if source:
            resolved = adapted(resolved, source, _keys(changes))
        return resolved, load_for(resolved, data, source)
    if data is None:
        raise ValueError("the recipe `folder` needs --data DIR with a folder per class; --recipe digits needs no data")
    on_disk = load_dataset(folder_recipe.dataset_name(data), data, in_memory=False)
    like = source.architecture if source else None
    preset = next((change.partition("=")[2] for change in changes if change.startswith("preset=")), None)
    resolved = folder_recipe.folder_recipe(
        on_disk, like, preset=preset, trained=source is not None, bf16=not bf16_is_emulated(device)
    )
    if source:
        resolved = adapted(resolved, source, {"preset", "img_size"} if preset else ())
    resolved = overridden(resolved, changes)
    dataset = into_memory(on_disk) if resolved.augment.in_memory else on_disk
    return resolved, _normalised_like(dataset, source)


def with_short_warmup(recipe: Recipe, epochs: float | None, changes: list[str]) -> Recipe:
    """`recipe` with a warm-up short enough for `--epochs`, unless the user has set one."""
    schedule = recipe.schedule
    if not epochs or schedule.warmup_steps is not None or "schedule.warmup_epochs" in _keys(changes):
        return recipe
    warmup = min(schedule.warmup_epochs, epochs / 10)
    return recipe.model_copy(update={"schedule": schedule.model_copy(update={"warmup_epochs": warmup})})


def retrofit_recipe(
    source: Source,
    recipe: str | None,
    epochs: float,
    overrides: list[str] | None,
    data: str | None,
    device: torch.device,
) -> Recipe:
    """The recipe of a teacher, or the one called `recipe`, with the changes for a retrofit and those of the user."""
    if source.architecture is None:
        raise ValueError(f"{source.name} holds weights only: a teacher is a run or timm:NAME, with --weights FILE")
    if recipe == folder_recipe.NAME or (recipe is None and source.name.startswith(TIMM)):
        trained, _ = prepare(folder_recipe.NAME, data, [], source, device)
    elif recipe is None:
        trained = Recipe.model_validate(runs.read_record(Path(source.name))["recipe"])
    else:
        trained = load_recipe(recipe)
    fitting = adapted(retrofitted(trained, epochs), source, _keys(overrides))
    return overridden(fitting, overrides)


def retrofit_origin(recipe: Recipe, source: Source) -> Origin:
    """The source is also the teacher, unless the recipe compares nothing with it."""
    compares = recipe.distill.logits or recipe.distill.blocks
    return Origin(init=source, teacher=source if compares else None)


def load_for(recipe: Recipe, data: str | None, source: Source | None) -> Dataset:
    """The data of a recipe, with the normalisation of the model that the run starts from."""
    if recipe.dataset == "digits" and data != os.environ.get(DATA_VARIABLE):
        raise ValueError(
            f"the recipe {recipe.name} comes with its own data and would not use --data {data}: leave out one of the "
            "two; --recipe folder trains on a folder of pictures"
        )
    dataset = load_dataset(recipe.dataset, data, in_memory=recipe.augment.in_memory)
    return _normalised_like(dataset, source)


def _normalised_like(dataset: Dataset, source: Source | None) -> Dataset:
    if source is None or source.preprocessing is None:
        return dataset
    return replace(dataset, mean=source.preprocessing.mean, std=source.preprocessing.std)


def epochs_change(epochs: float | None) -> list[str]:
    """`--epochs` as a change of the recipe."""
    return [] if epochs is None else [f"schedule.epochs={epochs:g}"]


def _keys(overrides: list[str] | None) -> set[str]:
    return {override.partition("=")[0] for override in overrides or []}
