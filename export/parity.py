"""The proof that what is served is what was trained: torch and ONNX Runtime on the same images, in any batch."""

import numpy as np
import numpy.typing as npt
import torch

from export.graph import ExportError
from export.precision import Promise
from service.engine import Engine
from service.manifest import Parity
from training.models import NormalizedModel

BATCH_SIZES = (1, 3, 8)
MAX_ABS_PROBABILITY = 1e-3

Logits = npt.NDArray[np.float32]


def check_parity(
    classifier: NormalizedModel, engine: Engine, images: npt.NDArray[np.uint8], promise: Promise
) -> Parity:
    """Compare on uint8 images (n,H,W,3), and on black, white and noise, alone and in batches.

    Every image stands alone, and in several places of batches with other neighbours. Raises ExportError for an answer
    that is not finite, or further from torch's, or from its own alone, than `promise` allows.
    """
    images = np.concatenate([images, edge_images(images.shape[1:])])
    with torch.inference_mode():
        expected_logits = classifier(torch.from_numpy(images))
    expected = expected_logits.numpy(), expected_logits.softmax(dim=-1).numpy()
    # Turned by a prime from size to size, so that no image keeps its place or its neighbours.
    answers = {
        size: _run(engine, images, batch=size, turned_by=7 * number)
        for number, size in enumerate(_allowed_sizes(promise))
    }
    logit, probability = (
        max(float(np.abs(answer[output] - expected[output]).max()) for answer in answers.values()) for output in (0, 1)
    )
    by_batch = max(float(np.abs(answer[0] - answers[1][0]).max()) for answer in answers.values())
    flips = max(int((answer[0].argmax(axis=1) != expected[0].argmax(axis=1)).sum()) for answer in answers.values())
    # Written so that a NaN fails too.
    if not np.isfinite([logit, probability]).all():
        raise ExportError("ONNX Runtime gives answers that are not finite")
    limit = promise.from_torch
    if limit is not None and (flips or logit > limit or probability > MAX_ABS_PROBABILITY):
        raise ExportError(
            f"torch and ONNX Runtime disagree: {logit:.3g} in a logit (allowed {limit:g}), {probability:.3g} in a "
            f"probability (allowed {MAX_ABS_PROBABILITY:g}), {flips} top-1 flips in {len(images)} images"
        )
    if promise.by_batch is not None and by_batch > promise.by_batch:
        raise ExportError(
            f"an answer depends on the batch: {by_batch:.3g} in a logit between an image alone and the same in a "
            f"batch (allowed {promise.by_batch:g})"
        )
    return Parity(
        images=len(images),
        batch_sizes=tuple(answers),
        max_abs_logit=_rounded_up(logit),
        max_abs_probability=_rounded_up(probability),
        max_abs_by_batch=_rounded_up(by_batch),
        top1_flips=flips,
    )


def edge_images(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Black, white and noise, uint8 (3,H,W,3)."""
    black, white = np.zeros(shape, dtype=np.uint8), np.full(shape, 255, dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)
    return np.stack([black, white, noise])


def run_all(engine: Engine, images: npt.NDArray[np.uint8], *, batch: int) -> tuple[Logits, Logits]:
    """Logits and probabilities of all images, `batch` at a time."""
    parts = [engine.run(images[start : start + batch]) for start in range(0, len(images), batch)]
    logits, probabilities = (np.concatenate(output) for output in zip(*parts, strict=True))
    return logits, probabilities


def _allowed_sizes(promise: Promise) -> tuple[int, ...]:
    return tuple(size for size in BATCH_SIZES if size <= (promise.max_batch or size))


def _run(engine: Engine, images: npt.NDArray[np.uint8], *, batch: int, turned_by: int) -> tuple[Logits, Logits]:
    logits, probabilities = run_all(engine, np.roll(images, turned_by, axis=0), batch=batch)
    return np.roll(logits, -turned_by, axis=0), np.roll(probabilities, -turned_by, axis=0)


def _rounded_up(value: float) -> float:
    """Two digits are enough to read."""
    return float(f"{value * 1.05:.1e}")
