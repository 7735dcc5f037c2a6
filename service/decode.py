"""From encoded bytes to the model's pixels. Every limit is checked before anything is decoded.

The rules, for all formats: first frame of an animation, EXIF orientation applied, alpha over white, 16-bit grey scaled
(not clipped) to 8 bits, the shorter side resized and the centre cropped, all as RGB.
"""

import io
import struct
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from service.bundle import Preprocessing
from service.errors import BadImage, TooManyPixels, UnsupportedImage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

# What Pillow's readers raise on damaged or hostile files, found on decoder fuzzing samples.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    EOFError,
    MemoryError,
    struct.error,
    RuntimeError,
    ZeroDivisionError,
)

_BACKGROUND = (255, 255, 255)

_JPEG_SCAN = b"\xff\xda"
_MAX_JPEG_WORK = 4_000_000_000
"""Pixels times scans of a JPEG: some seconds of decoding. Encoders write about ten scans."""

_MAX_STRETCH = 8
"""Images whose sides differ by more than this factor are not resized as a whole."""


def decode(data: bytes, preprocessing: Preprocessing, *, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Encoded image -> uint8 (crop, crop, 3). Raises UnsupportedImage, TooManyPixels or BadImage."""
    if not data:
        raise BadImage("the image is empty: send its bytes as the body")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise UnsupportedImage(f"not an image of a format accepted here: {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"the image claims far more pixels than the limit of {max_pixels:,}") from error
    except _DAMAGED as error:
        raise BadImage(f"the image is damaged: {error}") from error
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise TooManyPixels(f"the image is {width} × {height}; the limit is {max_pixels:,} pixels: make it smaller")
        # Each scan of a progressive JPEG is a pass over all pixels, and a small file can ask for thousands. The count
        # is an upper bound: compressed data never holds this marker, but metadata or a film behind the picture may.
        if image.format in ("JPEG", "MPO") and data.count(_JPEG_SCAN) * width * height > _MAX_JPEG_WORK:
            raise BadImage("the image is damaged: too many JPEG scans for its size")
        try:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb_crop(image, preprocessing)
        except Image.DecompressionBombError as error:
            raise TooManyPixels(f"a frame of the image exceeds the limit of {max_pixels:,} pixels") from error
        except _DAMAGED as error:
            raise BadImage(f"the image is damaged: {error}") from error


def _to_rgb_crop(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Resize first, so that what follows works on few pixels: a large image must not be held several times over."""
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey to white where it should scale it.
        grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return _resize_and_crop(grey.convert("RGB"), preprocessing)
    if image.mode in ("I", "F"):
        scale = _scale_to_8_bits(image)
        small = np.nan_to_num(_resize_and_crop(image.convert("F"), preprocessing), posinf=0.0, neginf=0.0)
        grey = Image.fromarray((small * scale).clip(0, 255).round().astype(np.uint8))
        return np.asarray(grey.convert("RGB"))
    if image.has_transparency_data:
        # Pillow weighs colours by alpha when it resizes RGBA, so what cannot be seen does not bleed into the rest.
        layer = Image.fromarray(_resize_and_crop(image.convert("RGBA"), preprocessing))
        background = Image.new("RGBA", layer.size, (*_BACKGROUND, 255))
        return np.asarray(Image.alpha_composite(background, layer).convert("RGB"))
    return _resize_and_crop(image if image.mode == "RGB" else image.convert("RGB"), preprocessing)


def _scale_to_8_bits(image: Image.Image) -> float:
    """32-bit grey has no agreed range: 0..1 as floats, 0..255 where it fits, else 0..65535."""
    _, top = cast(tuple[float, float], image.getextrema())
    if image.mode == "F" and top <= 1.0:
        return 255.0
    return 1.0 if top <= 255 else 255 / 65535


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[Any]:
    """Shorter side to `resize`, then the centre `crop` × `crop`: torchvision's Resize and CenterCrop, to the pixel."""
    crop, shorter = preprocessing.crop, min(image.size)
    width, height = (int(preprocessing.resize * side / shorter) for side in image.size)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    filter_ = Image.Resampling[preprocessing.interpolation.upper()]
    if max(width, height) <= _MAX_STRETCH * preprocessing.resize:
        if image.size != (width, height):
            image = image.resize((width, height), filter_)
        image = image.crop((left, top, left + crop, top + crop))
    else:
        # A strip of one pixel by a million would be huge when resized as a whole: take the same region only, which
        # differs by rounding.
        x, y = image.width / width, image.height / height
        image = image.resize((crop, crop), filter_, box=(left * x, top * y, (left + crop) * x, (top + crop) * y))
    return np.asarray(image)
