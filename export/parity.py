"""The proof that what is served is what was trained: torch and ONNX Runtime on the same real images."""

import numpy as np
import numpy.typing as npt
import torch

from export.graph import ExportError
from service.bundle import Parity
from service.engine import Engine
from training.models import Classifier

BATCH_SIZES = (1, 3, 8)
MAX_ABS_LOGIT = 1e-3
MAX_ABS_PROBABILITY = 1e-3


def check_parity(classifier: Classifier, engine: Engine, images: npt.NDArray[np.uint8]) -> Parity:
    """Compare on uint8 images (n,H,W,3) at each batch size.

    Raises ExportError if a logit differs by more than 1e-3 or any top-1 flips.
    """
    with torch.inference_mode():
        answers = classifier(torch.from_numpy(images))
    expected_logits = answers.numpy()
    expected_probabilities = answers.softmax(dim=-1).numpy()
    worst_logit, worst_probability = 0.0, 0.0
    for size in BATCH_SIZES:
        for start in range(0, len(images) - size + 1, size):
            rows = slice(start, start + size)
            logits, probabilities = engine.run(images[rows])
            if not np.isfinite(logits).all():
                raise ExportError(f"ONNX Runtime gives logits that are not finite at batch {size}")
            worst_logit = max(worst_logit, float(np.abs(logits - expected_logits[rows]).max()))
            worst_probability = max(
                worst_probability, float(np.abs(probabilities - expected_probabilities[rows]).max())
            )
            flips = int((logits.argmax(axis=1) != expected_logits[rows].argmax(axis=1)).sum())
            if flips or worst_logit > MAX_ABS_LOGIT or worst_probability > MAX_ABS_PROBABILITY:
                raise ExportError(
                    f"torch and ONNX Runtime disagree at batch {size}: {worst_logit:.3g} in a logit "
                    f"(allowed {MAX_ABS_LOGIT:g}), {worst_probability:.3g} in a probability "
                    f"(allowed {MAX_ABS_PROBABILITY:g}), {flips} top-1 flips in images {start} to {start + size - 1}"
                )
    return Parity(
        images=len(images),
        batch_sizes=BATCH_SIZES,
        max_abs_logit=_rounded_up(worst_logit),
        max_abs_probability=_rounded_up(worst_probability),
        top1_flips=0,
    )


def _rounded_up(value: float) -> float:
    """Two digits are enough to read."""
    return float(f"{value * 1.05:.1e}")
