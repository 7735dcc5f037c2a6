"""What an engine returns for a batch, and what each image of the batch gets from it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.errors import ModelFault

Pixels = npt.NDArray[np.uint8]
Outputs = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
RunBatch = Callable[[Pixels, int], Outputs]
"""Computes a batch with a number of threads."""


@dataclass(slots=True, kw_only=True)
class Output:
    """The outputs for one image, (num_classes,) each, and its time in each stage."""

    logits: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]
    queue_ms: float
    inference_ms: float
    decode_ms: float = 0.0
    """Set by the code that decoded it."""
    threads: int = 1
    """Threads that computed it."""


def require_shape(outputs: object, *, model: str, rows: int, classes: int | None) -> Outputs:
    """The outputs as logits and probabilities, (rows, classes) each. Raises ModelFault if they are anything else.

    `classes`: None if any number will do.
    """
    arrays = outputs if isinstance(outputs, tuple | list) else (outputs,)
    if len(arrays) == 2:
        logits, probabilities = arrays
        if isinstance(logits, np.ndarray) and isinstance(probabilities, np.ndarray):
            shape = rows, logits.shape[-1] if classes is None and logits.ndim else classes
            floats = logits.dtype.kind == probabilities.dtype.kind == "f"
            if floats and logits.shape == probabilities.shape == shape:
                return logits, probabilities
    given = ", ".join(
        f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        for array in arrays
    )
    wanted = f"two of float32 [{rows}, {'classes' if classes is None else classes}]"
    raise ModelFault(
        f"{model} gave outputs of the wrong shape ({given}; expected {wanted}): use another model", kind="shape"
    )


def finite_rows(outputs: Outputs) -> npt.NDArray[np.bool_] | None:
    """Which rows have no NaN and no infinity; None if that is all of them."""
    logits, probabilities = outputs
    if np.isfinite(logits).all() and np.isfinite(probabilities).all():
        return None
    return np.logical_and(np.isfinite(logits).all(axis=1), np.isfinite(probabilities).all(axis=1))


def not_finite(model: str) -> ModelFault:
    """The error of an image whose row of the outputs is not finite."""
    return ModelFault(f"{model} gave NaN or infinite outputs for this image: use another model", kind="not-finite")


def raisable(error: BaseException) -> Exception:
    """An error of the engine, in a form that a future can carry to its caller without ending the event loop."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(repr(error))
