"""Top-1, top-5 and agreement of an accuracy run, with the uncertainty that lies in the choice of images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.accuracy.evaluate import TOP, AccuracyRun, Image
from loadtests.statistics import paired_proportions, wilson
from service.manifest import Accuracy

CONFIDENCE = 0.95
_ROUNDING_POINTS = 0.005
"""A manifest's 0.537 may be 0.53702, rounded: half a unit of the fourth digit is no difference."""


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """A share of the images, as a part of 1; nan if there are none."""

    hits: int
    of: int
    share: float
    interval: tuple[float, float]
    """Wilson's interval at `CONFIDENCE`."""


@dataclass(frozen=True, kw_only=True)
class ManifestCheck:
    """A model's top-1 as served against its manifest's."""

    dataset: str
    split: str
    n: int
    top1: float
    top5: float
    same_images: bool
    """Whether a whole set of the manifest's size was sent: top-1 must then be equal, else only lie in the interval."""
    images_more_here: int | None
    """For the same images: how many more are right as served."""
    points_more_here: float
    """Percentage points above the manifest's."""
    holds: bool


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """One model."""

    model: str
    version: int
    top1: Proportion
    """Among the labelled images."""
    top5: Proportion | None
    """None for a model of no more than five classes."""
    failed: int
    """Failed requests, for all images."""
    manifest: ManifestCheck | None
    """None if the manifest states no accuracy, or no image is labelled."""

    @property
    def misses_manifest(self) -> bool:
        """Whether it is off its manifest on the same images."""
        return self.manifest is not None and self.manifest.same_images and not self.manifest.holds


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """The model against the reference, image by image."""

    same_class: Proportion
    """Images for which both give the same class, among all."""
    labelled: int
    only_model_right: int
    only_reference_right: int
    points: float
    """Percentage points of top-1 above the reference; nan if no image is labelled."""
    interval_points: tuple[float, float]
    p_value: float
    """See `loadtests.statistics.paired_proportions`."""


def model_results(run: AccuracyRun) -> list[ModelResult]:
    """One result per model."""
    labelled = [image for image in run.images if image.label is not None]
    whole_set = len(run.images) == run.total and not run.beyond_limit
    results = []
    for number, model in enumerate(run.models):
        top1 = _proportion([image.answers[number].correct for image in labelled])
        top5 = _proportion([image.answers[number].correct_top5 for image in labelled])
        check = (
            _check(model.accuracy, top1, whole_set, run.plan.max_drop_points) if model.accuracy and labelled else None
        )
        results.append(
            ModelResult(
                model=model.name,
                version=model.version,
                top1=top1,
                top5=top5 if len(model.labels) > TOP else None,
                failed=sum(image.answers[number].failure is not None for image in run.images),
                manifest=check,
            )
        )
    return results


def _proportion(hits: Sequence[bool]) -> Proportion:
    count, total = sum(hits), len(hits)
    interval = wilson(count, total, level=CONFIDENCE)
    return Proportion(hits=count, of=total, share=count / total if total else math.nan, interval=interval)


def _check(stated: Accuracy, top1: Proportion, whole_set: bool, max_drop_points: float) -> ManifestCheck:
    same_images = whole_set and top1.of == stated.n
    points = 100 * (top1.share - stated.top1)
    low, high = top1.interval
    return ManifestCheck(
        **stated.model_dump(exclude={"correct"}),
        same_images=same_images,
        images_more_here=top1.hits - round(stated.top1 * stated.n) if same_images else None,
        points_more_here=points,
        holds=abs(points) <= max_drop_points + _ROUNDING_POINTS if same_images else low <= stated.top1 <= high,
    )


def pair_result(run: AccuracyRun) -> PairResult | None:
    """The model against the reference; None without a reference."""
    if len(run.models) < 2:
        return None
    pairs = [[answer.correct for answer in image.answers] for image in run.images if image.label is not None]
    effect = paired_proportions([model for model, _ in pairs], [reference for _, reference in pairs])
    points, low, high = effect.at(CONFIDENCE) if effect else (math.nan,) * 3
    return PairResult(
        same_class=_proportion([not _differ(run, image) for image in run.images]),
        labelled=len(pairs),
        only_model_right=sum(model and not reference for model, reference in pairs),
        only_reference_right=sum(reference and not model for model, reference in pairs),
        points=points,
        interval_points=(low, high),
        p_value=effect.p_value if effect else math.nan,
    )


def disagreements(run: AccuracyRun) -> list[Image]:
    """Images on which the two models disagree; with one model, those that it has wrong."""
    if len(run.models) < 2:
        return [image for image in run.images if not image.answers[0].correct]
    return [image for image in run.images if _differ(run, image)]


def _differ(run: AccuracyRun, image: Image) -> bool:
    one, other = image.answers
    if one.failure is not None or other.failure is not None:
        return True
    # Two classes of one model may share a name, as ImageNet's two cranes do.
    same_classes = run.models[0].labels == run.models[1].labels
    return one.index != other.index if same_classes else one.label != other.label
