"""Top-1, top-5 and agreement of an accuracy run, with the uncertainty that lies in the choice of images."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtests.accuracy.measure import COLUMNS, TOP, AccuracyPlan, Answers, Images
from loadtests.experiment.model import Block, Experiment
from loadtests.report.rendering import UNKNOWN
from loadtests.statistics import paired_proportions, wilson
from service.manifest import Accuracy

Booleans = npt.NDArray[np.bool_]
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

    def __str__(self) -> str:
        """Share and interval in percent: `60.00 (31.27–83.18)`."""
        low, high = self.interval
        return f"{100 * self.share:.2f} ({100 * low:.2f}–{100 * high:.2f})" if self.of else UNKNOWN


@dataclass(kw_only=True)
class AccuracyExperiment(Experiment[AccuracyPlan]):
    """Blocks whose `info` has what the model says of itself, `retries`, `seconds` and `answers`."""

    images: Images = field(repr=False)

    @property
    def measured(self) -> bool:
        """Whether an image was answered."""
        return any(block.info["sent"] for block in self.blocks)

    @property
    def failed(self) -> bool:
        """Whether a request failed, or a model is off its manifest on the same images."""
        results = model_results(self)
        return any(found["failed"] or (found["manifest"] and found["manifest"]["missed"]) for found in results)

    @property
    def answers(self) -> list[Answers]:
        """Those of each block."""
        return [np.array([tuple(row) for row in block.info["answers"]], dtype=COLUMNS) for block in self.blocks]


def model_results(run: AccuracyExperiment) -> list[dict[str, Any]]:
    """Figures of each model that was asked, as they stand in results.json."""
    return [_model_result(run, block, answers) for block, answers in zip(run.blocks, run.answers, strict=True)]


def _model_result(run: AccuracyExperiment, block: Block, answers: Answers) -> dict[str, Any]:
    info, sent = block.info, answers["name"] != ""
    ranks = answers["rank"][sent & labelled(run)]
    top1, whole_set = _proportion(ranks == 1), bool(sent.all()) and not run.images.beyond_limit
    check = _manifest_check(info["accuracy"], top1, whole_set, run.plan) if info["accuracy"] and top1.of else None
    return {
        "model": block.arm,
        **{name: info[name] for name in ("version", "trained", "sent", "retries", "seconds")},
        "top1": top1,  # among the labelled images
        "top5": _proportion(ranks > 0) if len(info["classes"]) > TOP else None,
        "failed": int((answers["failure"] != "").sum()),
        "manifest": check,
    }


def _proportion(hits: Booleans) -> Proportion:
    count, total = int(hits.sum()), len(hits)
    interval = wilson(count, total, level=CONFIDENCE)
    return Proportion(hits=count, of=total, share=count / total if total else math.nan, interval=interval)


def _manifest_check(accuracy: dict[str, Any], top1: Proportion, whole_set: bool, plan: AccuracyPlan) -> dict[str, Any]:
    """Top-1 as served against the manifest's: of the same images it must be equal, else only lie in the interval."""
    stated = Accuracy.model_validate(accuracy)
    same_images = whole_set and top1.of == stated.n
    points = 100 * (top1.share - stated.top1)
    low, high = top1.interval
    holds = abs(points) <= plan.max_drop_points + _ROUNDING_POINTS if same_images else low <= stated.top1 <= high
    return {
        **stated.model_dump(exclude={"correct"}),
        "same_images": same_images,
        "images_more_here": top1.hits - round(stated.top1 * stated.n) if same_images else None,
        "points_more_here": points,
        "holds": holds,
        "missed": same_images and not holds,
    }


def pair_result(run: AccuracyExperiment) -> dict[str, Any] | None:
    """The model against the reference, on the images that both were asked about; None if there are none."""
    sent = np.logical_and.reduce([answers["name"] != "" for answers in run.answers])
    if len(run.blocks) < 2 or not sent.any():
        return None
    model, reference = (answers["rank"][sent & labelled(run)] == 1 for answers in run.answers)
    effect = paired_proportions(model, reference)
    points, low, high = effect.at(CONFIDENCE) if effect else (math.nan,) * 3
    return {
        "same_class": _proportion(~_differ(run)[sent]),
        "labelled": len(model),
        "only_model_right": int((model & ~reference).sum()),
        "only_reference_right": int((reference & ~model).sum()),
        "points": points,  # of top-1, above the reference's
        "interval_points": (low, high),
        "p_value": effect.p_value if effect else math.nan,
    }


def disagreements(run: AccuracyExperiment) -> list[int]:
    """Rows of the images on which the two models disagree; with one model, of those that it has wrong."""
    wrong = _differ(run) if len(run.blocks) > 1 else labelled(run) & (run.answers[0]["rank"] != 1)
    rows: list[int] = np.flatnonzero(wrong & np.logical_and.reduce([one["name"] != "" for one in run.answers])).tolist()
    return rows


def labelled(run: AccuracyExperiment) -> Booleans:
    """Whether the class of each image is known."""
    return np.array([label is not None for label in run.images.labels])


def _differ(run: AccuracyExperiment) -> Booleans:
    one, other = run.answers
    # Two classes of one model may share a name, as ImageNet's two cranes do.
    first, second = (np.array(block.info["classes"]) for block in run.blocks)
    same_classes = np.array_equal(first, second)
    differ = one["index"] != other["index"] if same_classes else first[one["index"]] != second[other["index"]]
    result: Booleans = differ | (one["failure"] != "") | (other["failure"] != "")
    return result
