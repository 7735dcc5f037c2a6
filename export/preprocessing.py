"""The preprocessing for another exporter's graph, as the user specifies it."""

from collections.abc import Callable
from typing import Literal

import timm

from export.graph import ExportError
from service.manifest import Preprocessing
from training.initial import TIMM, timm_preprocessing

Interpolation = Literal["bicubic", "bilinear"]
Channels = tuple[float, float, float]


def chosen_preprocessing(
    like: str | None,
    *,
    resize: int | None,
    crop: int | None,
    interpolation: Interpolation,
    mean: str | None,
    std: str | None,
) -> Callable[[int], Preprocessing]:
    """A function from the side of a graph's images to their preprocessing: timm's for `like`, or that of the options.

    Raises ExportError if neither or both are given, or a value is impossible.
    """
    if like is not None:
        if (resize, crop, mean, std) != (None,) * 4:
            raise ExportError("--preprocessing states resize, crop, mean and deviation: leave out the other options")
        if not like.startswith(TIMM):
            raise ExportError(f"unknown preprocessing {like!r}: write {TIMM}NAME, such as {TIMM}mobilenetv3_small_100")
        known = _of_timm(like.removeprefix(TIMM))
        return lambda side: _at(side, known, like)
    if mean is None or std is None:
        raise ExportError(
            "the normalisation is unknown: name --mean and --std (ImageNet: 0.485,0.456,0.406 and 0.229,0.224,0.225), "
            f"or --preprocessing {TIMM}NAME"
        )
    offset, scale = _channels(mean, "--mean"), _channels(std, "--std")
    if min(scale) <= 0:
        raise ExportError(f"--std {std} must be positive")

    def stated(side: int) -> Preprocessing:
        before = resize or side
        if before < side:
            raise ExportError(f"--resize {before} is less than the {side} px that the model takes")
        return Preprocessing(resize=before, crop=side, interpolation=interpolation, mean=offset, std=scale)

    return stated


def _of_timm(name: str) -> Preprocessing:
    try:
        model = timm.create_model(name, pretrained=False)
    except RuntimeError as error:
        raise ExportError(f"timm has no model {name!r}") from error
    return Preprocessing.model_validate(timm_preprocessing(model).model_dump())


def _at(side: int, known: Preprocessing, name: str) -> Preprocessing:
    if side != known.crop:
        raise ExportError(f"the graph takes images of {side} px, but {name} of {known.crop}: use the other options")
    return known


def _channels(text: str, option: str) -> Channels:
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError:
        raise ExportError(f"{option} {text!r} is not three numbers separated by commas, such as 0.5,0.5,0.5") from None
    return red, green, blue
