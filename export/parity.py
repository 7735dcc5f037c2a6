"""Whether the graph gives the outputs of the original, for single images and in batches."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from export.graph import ExportError
from export.precision import Tolerances
from service.engine import Engine
from service.manifest import Parity

BATCH_SIZES = (1, 3, 8)
MAX_ABS_PROBABILITY = 1e-3

Outputs = npt.NDArray[np.float32]


def check_parity(
    original: Callable[[npt.NDArray[np.uint8]], tuple[Outputs, Outputs]],
    engine: Engine,
    images: npt.NDArray[np.uint8],
    tolerances: Tolerances,
) -> Parity:
    """Compare with the `original` on uint8 images (n,H,W,3), each alone and in batches at several positions.

    Raises ExportError for an output that is not finite, or that differs by more than `tolerances` from the original's
    or between batch sizes.
    """
    expected = original(images)
    # Rotated by a different multiple of a prime for each batch size, so that positions and neighbours change.
    outputs = {
        size: _run_rotated(engine, images, batch=size, by=7 * number)
        for number, size in enumerate(BATCH_SIZES)
        if size <= (tolerances.max_batch or size)
    }
    logit, probability = (
        max(float(np.abs(output[kind] - expected[kind]).max()) for output in outputs.values()) for kind in (0, 1)
    )
    by_batch = max(float(np.abs(output[0] - outputs[1][0]).max()) for output in outputs.values())
    flips = max(int((output[0].argmax(axis=1) != expected[0].argmax(axis=1)).sum()) for output in outputs.values())
    if not np.isfinite([logit, probability]).all():
        raise ExportError("ONNX Runtime gives outputs that are not finite")
    limit = tolerances.from_torch
    if limit is not None and (flips or logit > limit or probability > MAX_ABS_PROBABILITY):
        raise ExportError(
            f"the original and the graph disagree: {logit:.3g} in a logit (allowed {limit:g}), {probability:.3g} in a "
            f"probability (allowed {MAX_ABS_PROBABILITY:g}), {flips} top-1 flips in {len(images)} images"
        )
    if tolerances.by_batch is not None and by_batch > tolerances.by_batch:
        raise ExportError(
            f"an output depends on the batch: {by_batch:.3g} in a logit between an image alone and in a batch "
            f"(allowed {tolerances.by_batch:g})"
        )
    return Parity(
        images=len(images),
        batch_sizes=tuple(outputs),
        max_abs_logit=_rounded_up(logit),
        max_abs_probability=_rounded_up(probability),
        max_abs_by_batch=_rounded_up(by_batch),
        top1_flips=flips,
    )


def predict_in_batches(engine: Engine, images: npt.NDArray[np.uint8], *, batch: int) -> tuple[Outputs, Outputs]:
    """Logits and probabilities of the graph, (n,classes), run on `batch` images at a time."""
    parts = [engine.run(images[start : start + batch]) for start in range(0, len(images), batch)]
    logits, probabilities = (np.concatenate(output) for output in zip(*parts, strict=True))
    return logits, probabilities


def _run_rotated(engine: Engine, images: npt.NDArray[np.uint8], *, batch: int, by: int) -> tuple[Outputs, Outputs]:
    logits, probabilities = predict_in_batches(engine, np.roll(images, by, axis=0), batch=batch)
    return np.roll(logits, -by, axis=0), np.roll(probabilities, -by, axis=0)


def _rounded_up(value: float) -> float:
    """Two significant digits, never below the value."""
    return float(f"{value * 1.05:.1e}")
