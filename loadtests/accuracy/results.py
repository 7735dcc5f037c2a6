"""The answers of an accuracy run: top-1, top-5 and agreement, and how much they depend on the choice of images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtests.experiment.model import Block, Experiment, Plan
from loadtests.generator.readers import Label, Source
from loadtests.report.rendering import UNKNOWN
from loadtests.statistics import paired_proportions, wilson
from service.manifest import Accuracy

TOP = 5
CONFIDENCE = 0.95
_ROUNDING_POINTS = 0.005
"""A manifest's 0.537 may be 0.53702, rounded: half a unit of the fourth digit is no difference."""

Booleans = npt.NDArray[np.bool_]
Answers = npt.NDArray[np.void]
"""A row of `COLUMNS` for each image that is to be sent, in the order of the data."""
COLUMNS = np.dtype(
    [
        ("name", object),  # of the image; empty until it is answered
        ("index", np.int64),  # the most probable class; -1 without an answer
        ("label", object),  # its name
        ("probability", np.float64),
        ("rank", np.int64),  # of the image's class among the five most probable, from 1; 0 if it is not among them
        ("failure", object),  # why the request failed, which counts as a wrong answer; else empty
    ]
)


@dataclass(frozen=True, kw_only=True)
class AccuracyPlan(Plan):
    """Which models are asked about which images: one arm, or two with the second as the reference; one round."""

    rounds: int = 1
    seconds: float = 0.0
    limit: int | None
    """Number of images, from the first; None for all."""
    connections: int
    max_drop_points: float
    """Percentage points by which top-1 may differ from the manifest's on the same images."""


@dataclass(kw_only=True)
class AccuracyExperiment(Experiment[AccuracyPlan]):
    """Blocks whose `info` has what `loadtests.accuracy.ask` found."""

    source: Source
    positions: Sequence[int]
    """Positions in the source of the images that are sent, ascending."""

    @property
    def measured(self) -> bool:
        """Whether an image was answered."""
        return any(block.info["sent"] for block in self.blocks)

    @property
    def labels(self) -> list[Label]:
        """The classes of the images that are sent."""
        return [self.source.labels[position] for position in self.positions]

    @property
    def answers(self) -> list[Answers]:
        """The answers of each block."""
        return [np.array([tuple(row) for row in block.info["answers"]], dtype=COLUMNS) for block in self.blocks]


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """A share of the images, as a fraction; nan if there are none."""

    hits: int
    of: int
    share: float
    interval: tuple[float, float]
    """Wilson's interval at `CONFIDENCE`."""

    def __str__(self) -> str:
        """Share and interval in percent: `60.00 (31.27–83.18)`."""
        low, high = self.interval
        return f"{100 * self.share:.2f} ({100 * low:.2f}–{100 * high:.2f})" if self.of else UNKNOWN


def figures(run: AccuracyExperiment) -> dict[str, Any]:
    """What results.json says besides the facts that all commands give."""
    left_out = len(run.source.labels) - len(run.positions)
    beyond_limit = len(run.source.labels[run.plan.limit :]) if run.plan.limit else 0
    return {
        "images": len(run.positions),
        "beyond_limit": beyond_limit,
        "unlabelled_left_out": left_out - beyond_limit,
        "confidence": CONFIDENCE,
        "models": [
            _model(run, block, answers, whole_set=not beyond_limit)
            for block, answers in zip(run.blocks, run.answers, strict=True)
        ],
        "reference": _pair(run),
    }


def fails(found: dict[str, Any]) -> bool:
    """Whether a request failed, or a model misses its manifest on the same images, according to the `figures`."""
    return any(one["failed"] or (one["manifest"] and one["manifest"]["missed"]) for one in found["models"])


def _model(run: AccuracyExperiment, block: Block, answers: Answers, *, whole_set: bool) -> dict[str, Any]:
    info, sent = block.info, answers["name"] != ""
    ranks = answers["rank"][sent & _labelled(run)]
    top1, whole_set = _proportion(ranks == 1), whole_set and bool(sent.all())
    return {
        "model": block.arm,
        **{name: info[name] for name in ("version", "trained", "sent", "retries", "seconds")},
        "top1": top1,  # among the labelled images, like top-5
        "top5": _proportion(ranks > 0) if len(info["classes"]) > TOP else None,
        "failed": int((answers["failure"] != "").sum()),
        "manifest": _check(info["accuracy"], top1, whole_set, run.plan) if info["accuracy"] and top1.of else None,
    }


def _proportion(hits: Booleans) -> Proportion:
    count, total = int(hits.sum()), len(hits)
    interval = wilson(count, total, level=CONFIDENCE)
    return Proportion(hits=count, of=total, share=count / total if total else math.nan, interval=interval)


def _check(accuracy: dict[str, Any], top1: Proportion, whole_set: bool, plan: AccuracyPlan) -> dict[str, Any]:
    """Top-1 as served against the manifest's: hardly lower on the same images, else within its interval."""
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


def _pair(run: AccuracyExperiment) -> dict[str, Any] | None:
    """The model against the reference, on the images that both were asked about; None if there are none."""
    sent = np.logical_and.reduce([answers["name"] != "" for answers in run.answers])
    if len(run.blocks) < 2 or not sent.any():
        return None
    model, reference = (answers["rank"][sent & _labelled(run)] == 1 for answers in run.answers)
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
    """Rows of the images on which the two models disagree; with one model, of those that it gets wrong."""
    wrong = _differ(run) if len(run.blocks) > 1 else _labelled(run) & (run.answers[0]["rank"] != 1)
    rows: list[int] = np.flatnonzero(wrong & np.logical_and.reduce([one["name"] != "" for one in run.answers])).tolist()
    return rows


def _labelled(run: AccuracyExperiment) -> Booleans:
    return np.array([label is not None for label in run.labels])


def _differ(run: AccuracyExperiment) -> Booleans:
    one, other = run.answers
    # Two classes of one model may share a name, as ImageNet's two cranes do.
    same_classes = run.blocks[0].info["classes"] == run.blocks[1].info["classes"]
    said = "index" if same_classes else "label"
    differ: Booleans = (one[said] != other[said]) | (one["failure"] != "") | (other["failure"] != "")
    return differ
