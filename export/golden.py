"""Golden examples: images drawn from a seed, and the outputs that the model must give for them.

Drawn, not taken from a data set, so that a bundle carries nobody's pictures; PNG, because its decoding is exact
everywhere. They check that this file on that machine computes what was computed here, by torch in fp32 and else by the
graph itself. Accuracy is measured elsewhere.
"""

import io
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.bundle import Golden
from service.images import decode
from service.manifest import Preprocessing, Tolerance
from service.models.verify import MAX_GOLDEN_PIXELS

COUNT = 8
Outputs = npt.NDArray[np.float32]
Answer = Callable[[npt.NDArray[np.uint8]], tuple[Outputs, Outputs]]
"""uint8 images (n,H,W,3) -> logits and probabilities (n,classes)."""


def draw_golden(answer: Answer, preprocessing: Preprocessing, tolerance: Tolerance) -> Golden:
    """Draw images whose top-1 no tolerated difference can flip, and record what `answer` gives for them."""
    images: list[bytes] = []
    outputs: list[tuple[Outputs, Outputs]] = []
    for attempt, image in enumerate(_drawings(preprocessing.crop)):
        pixels = decode(image, preprocessing, max_pixels=MAX_GOLDEN_PIXELS)
        logits, probabilities = answer(pixels[np.newaxis])
        second, first = np.sort(logits[0])[-2:]
        # An untrained model may be clear about nothing: then take what there is, after many tries.
        if first - second > 2 * tolerance.max_abs_logit or attempt > 50 * COUNT:
            images.append(image)
            outputs.append((logits, probabilities))
        if len(images) == COUNT:
            break
    all_logits, all_probabilities = (np.concatenate(output) for output in zip(*outputs, strict=True))
    return Golden(images=tuple(images), logits=all_logits, probabilities=all_probabilities)


def _drawings(side: int) -> Iterator[bytes]:
    """Blurred colour noise, without end; every fourth is larger and not square, so that resizing is checked too."""
    generator = np.random.default_rng(20_261_122)
    number = 0
    while True:
        size = (side * 2 + 6, side * 2 - 2) if number % 4 == 3 else (side, side)
        coarse = generator.integers(0, 256, size=(5, 5, 3), dtype=np.uint8)
        drawing = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        drawing.save(buffer, format="PNG")
        yield buffer.getvalue()
        number += 1
