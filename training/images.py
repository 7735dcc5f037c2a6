"""Decode images to RGB by the service's rules, so that a model is trained and evaluated on what it will be served.

EXIF orientation is applied, alpha blended over white, and 16-bit grey scaled; of an animation, the first frame is used.
"""

import io
from collections.abc import Callable
from typing import cast

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize

Fit = Callable[[Image.Image], Image.Image]
"""Resizes and crops; keeps the mode."""


def unchanged(image: Image.Image) -> Image.Image:
    """The Fit that does nothing."""
    return image


def resize_and_crop(resize: int, crop: int, interpolation: str = "bicubic") -> Fit:
    """Resize the shorter side to `resize` pixels, then take the central `crop` × `crop`."""
    fit: Fit = Compose([Resize(resize, InterpolationMode(interpolation)), CenterCrop(crop)])
    return fit


def decode(data: bytes, fit: Fit = unchanged) -> Image.Image:
    """Encoded image -> RGB. Raises what Pillow raises, which may be almost any exception.

    `fit` runs where the service resizes: before alpha is blended and 32-bit grey is scaled.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):
            # Pillow clips 16-bit grey to white where it should scale it.
            return fit(Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB"))
        if image.mode in ("I", "F"):
            scale = _scale_to_8_bits(image)
            small = np.nan_to_num(np.asarray(fit(image.convert("F"))), posinf=0.0, neginf=0.0)
            return Image.fromarray((small * scale).clip(0, 255).round().astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            layer = fit(image.convert("RGBA"))
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        return fit(image.convert("RGB"))


def _scale_to_8_bits(image: Image.Image) -> float:
    """32-bit grey has no agreed range: 0..1 for floats up to 1, 0..255 where all values fit, else 0..65535."""
    _, top = cast(tuple[float, float], image.getextrema())
    if image.mode == "F" and top <= 1.0:
        return 255.0
    return 1.0 if top <= 255 else 255 / 65535
