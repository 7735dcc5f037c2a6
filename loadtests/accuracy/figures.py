"""Top-1, top-5 and agreement of a survey, with what chance alone may make of them."""

import math
from dataclasses import dataclass
from statistics import NormalDist

from loadtests.accuracy.survey import TOP, Asked, Model, Stated, Survey

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many of how many."""

    hits: int
    of: int

    @property
    def value(self) -> float:
        """A part of 1; not a number of none."""
        return self.hits / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """See `wilson`."""
        return wilson(self.hits, self.of)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A model's top-1 against what its manifest states."""

    stated: Stated
    same_set: bool
    """A whole set of as many images as the manifest's: top-1 must then be the same, else only lie in the interval."""
    images: int | None
    """Of the same set: how many more are right here."""
    points: float
    """Percentage points above the stated."""
    holds: bool


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One model."""

    model: Model
    top1: Share
    """Of the labelled images."""
    top5: Share | None
    """None for a model of no more than five classes."""
    failed: int
    """Requests, over all images."""
    check: Check | None
    """None where the manifest states no accuracy, or no image is labelled."""


@dataclass(frozen=True, kw_only=True)
class Versus:
    """The first model against the second."""

    equal: Share
    """Images for which both give the same class, of all."""
    only_first: int
    """Labelled images that the first alone has right; of `labelled`."""
    only_second: int
    labelled: int
    p_value: float
    """See `mcnemar`."""
    points: float
    """Percentage points of top-1 that the first is above the second."""
    interval: tuple[float, float]
    """See `paired_difference`; in points."""


def figures(survey: Survey, *, tolerance: float) -> list[Figures]:
    """Of each model. `tolerance` in percentage points: how far top-1 may be from the manifest's on the same set."""
    labelled = [asked for asked in survey.asked if asked.label is not None]
    whole = len(survey.asked) == survey.images and not survey.cut
    found = []
    for number, model in enumerate(survey.models):
        answers = [asked.answers[number] for asked in labelled]
        top1 = Share(hits=sum(answer.right for answer in answers), of=len(answers))
        top5 = Share(hits=sum(answer.right_in_top5 for answer in answers), of=len(answers))
        found.append(
            Figures(
                model=model,
                top1=top1,
                top5=top5 if len(model.labels) > TOP else None,
                failed=sum(asked.answers[number].failure is not None for asked in survey.asked),
                check=_check(model.stated, top1, whole, tolerance) if model.stated and labelled else None,
            )
        )
    return found


def versus(survey: Survey) -> Versus | None:
    """None with one model."""
    if len(survey.models) < 2:
        return None
    labelled = [asked.answers for asked in survey.asked if asked.label is not None]
    first = sum(one.right and not other.right for one, other in labelled)
    second = sum(other.right and not one.right for one, other in labelled)
    low, high = paired_difference(first, second, len(labelled))
    return Versus(
        equal=Share(hits=len(survey.asked) - len(disagreements(survey)), of=len(survey.asked)),
        only_first=first,
        only_second=second,
        labelled=len(labelled),
        p_value=mcnemar(first, second),
        points=100 * (first - second) / len(labelled) if labelled else math.nan,
        interval=(100 * low, 100 * high),
    )


def disagreements(survey: Survey) -> list[Asked]:
    """Images on which the two models disagree; with one model, those that it has wrong."""
    if len(survey.models) < 2:
        return [asked for asked in survey.asked if not asked.answers[0].right]
    # Two classes of one model may share a name, as ImageNet's two cranes do.
    by_index = survey.models[0].labels == survey.models[1].labels

    def differ(asked: Asked) -> bool:
        one, other = asked.answers
        if one.failure is not None or other.failure is not None:
            return True
        return one.index != other.index if by_index else one.label != other.label

    return [asked for asked in survey.asked if differ(asked)]


def wilson(hits: int, of: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval of a binomial share, in parts of 1 (Wilson 1927, JASA 22:209, without continuity correction)."""
    if not of:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = hits / of
    scale = 1 + z * z / of
    middle = (share + z * z / (2 * of)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p value for equal accuracy, from the images that one alone has right (McNemar 1947; exact binomial)."""
    trials, few = only_first + only_second, min(only_first, only_second)
    term = total = 1
    for successes in range(few):
        term = term * (trials - successes) // (successes + 1)
        total += term
    return min(1.0, 2 * total / (1 << trials))


def paired_difference(
    only_first: int, only_second: int, of: int, *, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Interval of first minus second, in parts of 1: Wald's, half an image added to each of the four cells.

    Agresti and Min 2005, Statistics in Medicine 24:729: it keeps its level for small samples too.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    first, second, total = only_first + 0.5, only_second + 0.5, of + 2
    middle = (first - second) / total
    half = z * math.sqrt(first + second - (first - second) ** 2 / total) / total
    return max(-1.0, middle - half), min(1.0, middle + half)


def _check(stated: Stated, top1: Share, whole: bool, tolerance: float) -> Check:
    same_set = whole and top1.of == stated.n
    points = 100 * (top1.value - stated.top1)
    low, high = top1.interval
    return Check(
        stated=stated,
        same_set=same_set,
        images=top1.hits - round(stated.top1 * stated.n) if same_set else None,
        points=points,
        # A stated 0.537 may be 0.53702, rounded: half a unit of the fourth digit is no difference.
        holds=abs(points) <= tolerance + 0.005 if same_set else low <= stated.top1 <= high,
    )
