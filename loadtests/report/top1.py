"""Top-1 of two models, by their manifests: image by image where both say which images they get right."""

import base64
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from loadtests.statistics import Effect, independent_proportions, paired_proportions

Pairing = Literal["paired", "independent"]
"""Judged on the same images one by one, or as if each model had been asked other images."""


def top1_percent(info: dict[str, Any]) -> float | None:
    """The manifest's top-1; None for random weights, and where the service says nothing about its model."""
    accuracy = info.get("accuracy")
    return 100 * float(accuracy["top1"]) if accuracy else None


def compare_top1(info: dict[str, Any], baseline: dict[str, Any]) -> tuple[Effect | None, Pairing | None]:
    """The difference in percentage points, from what the service says about two models, and how it was judged.

    None if they were tested on other sets.
    """
    ours, theirs = info.get("accuracy"), baseline.get("accuracy")
    if not ours or not theirs or any(ours.get(name) != theirs.get(name) for name in ("dataset", "split")):
        return None, None
    same = ours["n"] == theirs["n"] and _labels(ours) == _labels(theirs)
    correct, baseline_correct = _correct(ours), _correct(theirs)
    if same and correct is not None and baseline_correct is not None:
        return paired_proportions(correct, baseline_correct), "paired"
    return independent_proportions(ours["top1"], ours["n"], theirs["top1"], theirs["n"]), "independent"


def _labels(accuracy: dict[str, Any]) -> str | None:
    """Digest of the true classes in the order of the images."""
    return (accuracy.get("correct") or {}).get("labels_sha256")


def _correct(accuracy: dict[str, Any]) -> npt.NDArray[np.bool_] | None:
    """Whether each image is classified correctly, (n,); None where that is unknown."""
    try:
        packed = np.frombuffer(base64.b64decode(accuracy["correct"]["top1"], validate=True), dtype=np.uint8)
    except (KeyError, TypeError, ValueError):
        return None
    bits = np.unpackbits(packed)[: accuracy["n"]]
    return bits.astype(np.bool_) if len(bits) == accuracy["n"] else None
