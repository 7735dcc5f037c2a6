"""The images that verify an export: against torch when a bundle is made, on each machine when it is loaded.

Parity images are test images and edge cases. Golden images travel in the bundle with the outputs that they must give.
They are drawn from a seed, so that a bundle carries no one's pictures, and stored as PNG, which decodes exactly
everywhere; the outputs are the original's in fp32, and otherwise the graph's own. Accuracy is measured elsewhere.
"""

import io
import itertools
from collections.abc import Iterator

import numpy as np
from PIL import Image

from export.sources import ExportSource, Outputs, Pixels, Predict
from service.bundle import Golden
from service.images import decode
from service.manifest import Preprocessing, Tolerance
from service.models.verify import MAX_GOLDEN_PIXELS

TEST_IMAGES, GOLDEN_IMAGES = 256, 8


def parity_images(source: ExportSource) -> Pixels:
    """The first test images, then black, white and noise: uint8 (n,H,W,3)."""
    images = source.test_images(TEST_IMAGES)
    black, white = np.zeros_like(images[0]), np.full_like(images[0], 255)
    noise = np.random.default_rng(0).integers(0, 256, size=images.shape[1:], dtype=np.uint8)
    return np.concatenate([images, [black, white, noise]])


def draw_golden(predict: Predict, preprocessing: Preprocessing, tolerance: Tolerance) -> Golden:
    """Draw images whose top-1 cannot change within `tolerance`, and record the outputs of `predict` for them."""
    images: list[bytes] = []
    outputs: list[tuple[Outputs, Outputs]] = []
    for attempt, image in enumerate(_drawings(preprocessing.crop)):
        pixels = decode(image, preprocessing, max_pixels=MAX_GOLDEN_PIXELS)
        logits, probabilities = predict(pixels[np.newaxis])
        second, first = np.sort(logits[0])[-2:]
        # An untrained model may be sure of no image: after many attempts, take any.
        if first - second > 2 * tolerance.max_abs_logit or attempt > 10 * GOLDEN_IMAGES:
            images.append(image)
            outputs.append((logits, probabilities))
        if len(images) == GOLDEN_IMAGES:
            break
    all_logits, all_probabilities = (np.concatenate(output) for output in zip(*outputs, strict=True))
    return Golden(images=tuple(images), logits=all_logits, probabilities=all_probabilities)


def _drawings(side: int) -> Iterator[bytes]:
    """Endless blurred colour noise as PNG; every fourth image is larger and not square, to cover resizing."""
    generator = np.random.default_rng(20_261_122)
    for number in itertools.count():
        size = (side * 2 + 6, side * 2 - 2) if number % 4 == 3 else (side, side)
        coarse = generator.integers(0, 256, size=(5, 5, 3), dtype=np.uint8)
        drawing = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        drawing.save(buffer, format="PNG")
        yield buffer.getvalue()
