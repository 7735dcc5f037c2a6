"""What each precision guarantees: tolerances against torch, between batches and between machines, and its devices."""

from dataclasses import dataclass

from service.engine import Device
from service.manifest import Precision, Tolerance


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Largest differences in a logit, and where the precision may run."""

    golden: Tolerance
    """Between the exporting machine and any other."""
    from_torch: float | None = None
    """From the checkpoint, on every image and with equal top-1; None where the accuracy on the test split decides."""
    by_batch: float | None = None
    """Between an image alone and the same image in a batch; None if batches are not allowed."""
    max_batch: int | None = None
    devices: tuple[Device, ...] = ("cpu", "cuda", "tensorrt")


def _golden(*, logit: float, probability: float) -> Tolerance:
    return Tolerance(max_abs_logit=logit, max_abs_probability=probability)


TOLERANCES: dict[Precision, Tolerances] = {
    "fp32": Tolerances(golden=_golden(logit=1e-3, probability=1e-3), from_torch=1e-3, by_batch=1e-4),
    # A GPU computes in float16 what ONNX Runtime's CPU kernels partly widen to float32 and back.
    "fp16": Tolerances(golden=_golden(logit=5e-2, probability=1e-2), by_batch=1e-2),
    # Integer sums are exact everywhere, but an activation may round to the neighbouring integer.
    "int8": Tolerances(golden=_golden(logit=2e-1, probability=5e-2), by_batch=1e-1, devices=("cpu",)),
    # One activation scale per batch: an output depends on the whole batch, so the batch is one image.
    "int8-dynamic": Tolerances(golden=_golden(logit=2e-1, probability=5e-2), max_batch=1, devices=("cpu",)),
}

MAX_ACCURACY_LOSS = 0.005
"""Largest loss of top-1 on the full test split, as a fraction, that is published without explicit acceptance."""
