"""A picture as RGB, by the service's rules, so that what is trained and evaluated is what is served.

EXIF orientation applied, alpha over white, 16-bit grey scaled and not clipped, the first frame of an animation.
"""

import io
from collections.abc import Callable
from typing import cast

import numpy as np
from PIL import Image, ImageOps

Fit = Callable[[Image.Image], Image.Image]
"""Resizes and crops; keeps the mode."""


def decode(data: bytes, fit: Fit = lambda picture: picture) -> Image.Image:
    """Encoded image -> RGB. Raises what Pillow raises, which is almost anything.

    `fit` is done where the service does it: before alpha is blended and 32-bit grey is scaled.
    """
    with Image.open(io.BytesIO(data)) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I;16"):
            # Pillow clips 16-bit grey to white where it should scale it.
            return fit(Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB"))
        if picture.mode in ("I", "F"):
            scale = _scale_to_8_bits(picture)
            small = np.nan_to_num(np.asarray(fit(picture.convert("F"))), posinf=0.0, neginf=0.0)
            return Image.fromarray((small * scale).clip(0, 255).round().astype(np.uint8)).convert("RGB")
        if picture.has_transparency_data:
            layer = fit(picture.convert("RGBA"))
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        return fit(picture.convert("RGB"))


def _scale_to_8_bits(picture: Image.Image) -> float:
    """32-bit grey has no agreed range: 0..1 as floats, 0..255 where it fits, else 0..65535."""
    _, top = cast(tuple[float, float], picture.getextrema())
    if picture.mode == "F" and top <= 1.0:
        return 255.0
    return 1.0 if top <= 255 else 255 / 65535
