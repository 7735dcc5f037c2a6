"""What each precision promises: how far from torch, how far from itself, and where it may run."""

from dataclasses import dataclass

from service.engine import Device
from service.manifest import Precision, Tolerance


@dataclass(frozen=True, kw_only=True)
class Promise:
    """Limits on differences between logits; None where accuracy on the whole test split decides instead."""

    from_torch: float | None
    """At most this far from the checkpoint, on every image; and with None, and only then, top-1 may flip."""
    by_batch: float | None
    """An image alone and in any place of a batch at most this far apart."""
    golden: Tolerance
    """Another machine at most this far from the one that exported."""
    devices: tuple[Device, ...]
    max_batch: int | None = None


_ALL: tuple[Device, ...] = ("cpu", "cuda", "tensorrt")

PROMISES: dict[Precision, Promise] = {
    "fp32": Promise(
        from_torch=1e-3,
        by_batch=1e-4,
        golden=Tolerance(max_abs_logit=1e-3, max_abs_probability=1e-3),
        devices=_ALL,
    ),
    # A GPU computes in float16 what ONNX Runtime's CPU kernels partly widen to float32 and back.
    "fp16": Promise(
        from_torch=None,
        by_batch=1e-2,
        golden=Tolerance(max_abs_logit=5e-2, max_abs_probability=1e-2),
        devices=_ALL,
    ),
    # Integers add up alike everywhere; what is rounded to them may differ by one step in the last place of a float.
    "int8": Promise(
        from_torch=None,
        by_batch=1e-1,
        golden=Tolerance(max_abs_logit=2e-1, max_abs_probability=5e-2),
        devices=("cpu",),
    ),
    # One scale for the whole batch: an image's answer depends on its neighbours, so it must have none.
    "int8-dynamic": Promise(
        from_torch=None,
        by_batch=None,
        golden=Tolerance(max_abs_logit=2e-1, max_abs_probability=5e-2),
        devices=("cpu",),
        max_batch=1,
    ),
}
"""float32 is the checkpoint itself; the others are gated by MAX_ACCURACY_LOSS."""

MAX_ACCURACY_LOSS = 0.005
"""Of top-1 on the full test split, as a fraction: half a point."""
