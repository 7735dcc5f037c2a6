"""From encoded bytes to the model's pixels. Every limit is checked before anything is decoded.

The rules, for all formats: first frame of an animation, EXIF orientation applied, alpha over white, 16-bit grey scaled
(not clipped) to 8 bits, everything to RGB; then the shorter side is resized and the centre cropped.
"""

import io
import struct

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
        try:
            return _resize_and_crop(_to_rgb(image), preprocessing)
        except Image.DecompressionBombError as error:
            raise TooManyPixels(f"a frame of the image exceeds the limit of {max_pixels:,} pixels") from error
        except _DAMAGED as error:
            raise BadImage(f"the image is damaged: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
    if upright.mode in ("I", "F"):
        return Image.fromarray(_scale_to_8_bits(np.asarray(upright))).convert("RGB")
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        background = Image.new("RGBA", layer.size, (*_BACKGROUND, 255))
        return Image.alpha_composite(background, layer).convert("RGB")
    return upright.convert("RGB")


def _scale_to_8_bits(values: npt.NDArray[np.int32] | npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """32-bit grey has no agreed range: 0..1 as floats, 0..255 where it fits, else 0..65535."""
    finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    top = finite.max(initial=0.0)
    scale = 255.0 if top <= 1.0 and values.dtype.kind == "f" else 1.0 if top <= 255 else 255 / 65535
    return (finite * scale).clip(0, 255).round().astype(np.uint8)


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Shorter side to `resize`, then the centre `crop` × `crop`, in one resampling of just the region needed."""
    width, height = image.size
    crop = preprocessing.crop
    if (width, height) != (crop, crop) or preprocessing.resize != crop:
        # The crop's side in pixels of the original image.
        side = min(width, height) * crop / preprocessing.resize
        left, top = (width - side) / 2, (height - side) / 2
        image = image.resize(
            (crop, crop),
            Image.Resampling[preprocessing.interpolation.upper()],
            box=(max(0.0, left), max(0.0, top), min(width, left + side), min(height, top + side)),
        )
    return np.asarray(image, dtype=np.uint8)
