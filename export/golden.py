"""Golden examples: images drawn from a seed, and the outputs that torch gives for them.

Drawn, not taken from a data set, so that a bundle carries nobody's pictures; PNG, because its decoding is exact
everywhere. They check that this file on that machine computes what torch computed here. Accuracy is measured elsewhere.
"""

import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from service.bundle import Golden, Preprocessing, Tolerance
from service.decode import decode
from service.golden import MAX_GOLDEN_PIXELS
from training.models import Classifier

COUNT = 8


def draw_golden(classifier: Classifier, preprocessing: Preprocessing, tolerance: Tolerance) -> Golden:
    """Draw images whose top-1 is clear of rounding, and record torch's outputs for them."""
    images: list[bytes] = []
    logits: list[torch.Tensor] = []
    candidates = _drawings(preprocessing.crop)
    # An untrained model may be clear about nothing: then take what there is, after many tries.
    for attempt, image in enumerate(candidates):
        pixels = torch.from_numpy(decode(image, preprocessing, max_pixels=MAX_GOLDEN_PIXELS).copy()).unsqueeze(0)
        with torch.inference_mode():
            answer = classifier(pixels)[0]
        first, second = answer.topk(2).values.tolist()
        if first - second > 10 * tolerance.max_abs_logit or attempt > 50 * COUNT:
            images.append(image)
            logits.append(answer)
        if len(images) == COUNT:
            break
    stacked = torch.stack(logits)
    return Golden(
        images=tuple(images),
        logits=stacked.numpy(),
        probabilities=stacked.softmax(dim=-1).numpy(),
    )


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
