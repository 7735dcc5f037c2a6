"""The check before traffic: a loaded model must give its golden outputs on this machine."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from service.bundle import GOLDEN_FILE, Bundle, Golden
from service.engine import Engine
from service.errors import BundleError, ImageError
from service.host import bytes_saturate, cpu_features
from service.images import decode
from service.manifest import Manifest

MAX_GOLDEN_PIXELS = 4_000_000

Run = Callable[[npt.NDArray[np.uint8]], tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]


def verify_golden(bundle: Bundle, engine: Engine, *, first: int | None = None, run: Run | None = None) -> None:
    """Check a bundle on disk against its own golden file, or the `first` images of it. Raises BundleError.

    `run` runs a batch where the engine's own `run` must not be called.
    """
    golden = bundle.golden()
    part = Golden(
        images=golden.images[:first], logits=golden.logits[:first], probabilities=golden.probabilities[:first]
    )
    check_golden(part, bundle.manifest, engine, path=bundle.folder / GOLDEN_FILE, run=run)


def check_golden(golden: Golden, manifest: Manifest, engine: Engine, *, path: Path, run: Run | None = None) -> None:
    """Decode the golden images of the file `path`, run them in as few batches as the model allows, and compare.

    Raises BundleError if an output exceeds the manifest's tolerance or a top-1 differs. Its message names the file, the
    largest differences, the device and the CPU.
    """
    run = run or engine.run
    try:
        pixels = np.stack(
            [decode(image, manifest.preprocessing, max_pixels=MAX_GOLDEN_PIXELS) for image in golden.images]
        )
    except ImageError as error:
        raise BundleError(f"{path}: {error}") from error
    step = manifest.max_batch or len(pixels)
    batches = [run(pixels[start : start + step]) for start in range(0, len(pixels), step)]
    logits, probabilities = (np.concatenate(output) for output in zip(*batches, strict=True))
    if logits.shape != golden.logits.shape:
        raise BundleError(f"{path}: the model gives {logits.shape[1:]} outputs, not {golden.logits.shape[1:]}")
    logit_error = float(np.abs(logits - golden.logits).max())
    probability_error = float(np.abs(probabilities - golden.probabilities).max())
    flips = int((logits.argmax(axis=1) != golden.logits.argmax(axis=1)).sum())
    # Written so that a NaN fails too.
    if (
        flips
        or not logit_error <= manifest.tolerance.max_abs_logit
        or not probability_error <= manifest.tolerance.max_abs_probability
    ):
        raise BundleError(
            f"{path}: the model's outputs differ from the golden ones by {logit_error:.3g} in a logit "
            f"(allowed {manifest.tolerance.max_abs_logit:g}), {probability_error:.3g} in a probability "
            f"(allowed {manifest.tolerance.max_abs_probability:g}), "
            f"and the top-1 class in {flips} of {len(logits)} images; "
            f"engine {engine.device}, CPU {cpu_features()}{_hint(manifest)}"
        )


def _hint(manifest: Manifest) -> str:
    """The most likely reason and what to do, where both are known."""
    if manifest.precision.startswith("int8") and bytes_saturate():
        return "; 8-bit products saturate on x86 processors without VNNI: serve the fp32 model here"
    return ""
