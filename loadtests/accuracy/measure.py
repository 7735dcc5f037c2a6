"""What is asked of which models, and what they answer: one block per model, whose answers are a table."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtests.experiment.model import Plan
from loadtests.generator.readers import Label, PayloadError, Source, open_source

TOP = 5
Answers = npt.NDArray[np.void]
"""A row per image, in the order of the data."""
COLUMNS = np.dtype(
    [
        ("name", object),  # of the image; empty until it is answered
        ("index", np.int64),  # the most probable class; -1 if the request failed
        ("probability", np.float64),
        ("rank", np.int64),  # of the right class among the five most probable, from 1; 0 if it is not among them
        ("failure", object),  # why the request failed: it counts as a wrong answer; else empty
    ]
)
UNKNOWN_ANSWER = (-1, 0.0, 0)
"""Index, probability and rank of an image that is not answered."""


@dataclass(frozen=True, kw_only=True)
class AccuracyPlan(Plan):
    """Which models are asked about which images: one arm, or a second one as the reference; one round."""

    limit: int | None
    """Number of images, from the first; None for all."""
    connections: int
    max_drop_points: float
    """Percentage points that top-1 may be off the manifest's on the same images."""
    labels_sha256: str
    """Of the labels of all images that are sent: a run is not resumed with others."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images of a source that are sent; each is read when it is its turn."""

    source: Source
    positions: Sequence[int]
    """In the source, ascending."""
    labels: list[Label]
    """One for each position."""
    unlabelled: int
    """Images left out because one model alone says nothing about them."""
    beyond_limit: int
    """Images left out by `--limit`."""

    @property
    def labels_sha256(self) -> str:
        """Digest of the labels in their order."""
        return hashlib.sha256(repr(self.labels).encode()).hexdigest()


def choose_images(data: Path, limit: int | None, *, labelled: bool) -> Images:
    """The first images of a folder, or those of them that are `labelled`. Raises PayloadError."""
    source = open_source(data)
    first = range(len(source.labels))[:limit]
    positions = [position for position in first if not labelled or source.labels[position] is not None]
    if not positions:
        raise PayloadError(
            f"{data} holds no labels: it needs a labels.csv, class folders, or a column fine_label or label "
            "(with --reference, two models can be compared without labels)"
        )
    return Images(
        source=source,
        positions=positions,
        labels=[source.labels[position] for position in positions],
        unlabelled=len(first) - len(positions),
        beyond_limit=len(source.labels) - len(first),
    )


def no_answers(count: int) -> Answers:
    """To be filled."""
    return np.array([("", *UNKNOWN_ANSWER, "")] * count, dtype=COLUMNS)
