"""Preprocessing: from an encoded image to the model's pixels. All limits are checked before anything is decoded.

`decode` does it in one call. `open_image` and `OpenedImage.render` are its two steps, for callers that must know the
amount of work first. Everything that needs the served pixels calls these, also the load tests.

The rules for all formats: the first frame of an animation, EXIF orientation applied, alpha over white, 16-bit grey
scaled (not clipped) to 8 bits, the shorter side resized and the centre cropped, all as RGB.
"""

import io
import struct
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from service.errors import BadImage, TooManyPixels, UnsupportedImage
from service.manifest import Preprocessing

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
JPEG = ("JPEG", "MPO")
"""Pillow's names of a JPEG: MPO holds several pictures."""

# What Pillow raises on damaged or hostile files, found with samples of fuzzed files.
_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
)

_BACKGROUND = (255, 255, 255)

_JPEG_SCAN = b"\xff\xda"
_MAX_JPEG_WORK = 4_000_000_000
"""Limit of pixels times scans of a JPEG: some seconds of decoding. Encoders write about ten scans."""

_SCANS_A_PIXEL = 10
"""A further scan costs a tenth of decoding the picture: 0.5 to 1.1 ms of CPU per megapixel against 10."""

OTHER_FORMATS = 2
"""Cost of a pixel of the other formats, in pixels of a JPEG: measured 1.1 (GIF) to 4 (PNG with alpha)."""

MAX_PIXELS = 178_956_970
"""Pillow refuses images of more pixels, whatever limit `decode` is given."""

LARGE_PIXELS = 2_000_000
"""Decoding work, as in OpenedImage.pixels, above which an image is large, so that small ones should not wait for it.

At 10 ms of CPU per megapixel smaller images take about 20 ms, at worst 40; docs/service.md has times of larger ones.
"""

DRAFT_MARGIN = 3
"""A JPEG is decoded at 1/2, 1/4 or 1/8 if its shorter side is then still this many times `resize`.

docs/service.md has the differences that were measured for margins from 1 to 4.
"""

_MAX_STRETCH = 8
"""Images with a larger aspect ratio are not resized as a whole."""

_Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def decode(data: bytes, preprocessing: Preprocessing, *, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Encoded image -> uint8 (crop, crop, 3), RGB, exactly as it is served.

    `max_pixels`: limit of width times height, at most MAX_PIXELS. Raises UnsupportedImage, TooManyPixels or BadImage.
    """
    return open_image(data, preprocessing, max_pixels=max_pixels).render()


def open_image(data: bytes, preprocessing: Preprocessing, *, max_pixels: int) -> "OpenedImage":
    """Read the header and check all limits, without decoding. Raises as `decode`."""
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
    try:
        pixels = _work(image, data, max_pixels=max_pixels)
    except BaseException:
        image.close()
        raise
    return OpenedImage(image=image, preprocessing=preprocessing, max_pixels=max_pixels, pixels=pixels)


@dataclass(slots=True, kw_only=True, eq=False)
class OpenedImage:
    """An image whose header is read and within the limits. If it is not rendered, nothing needs to be closed."""

    image: ImageFile.ImageFile
    preprocessing: Preprocessing
    max_pixels: int
    pixels: int
    """Work of decoding it whole, in pixels of a JPEG of one scan; to compare with LARGE_PIXELS.

    Width times height; each further scan of a JPEG adds a tenth (their number is an upper bound); a pixel of other
    formats counts as two. What drafting saves is not subtracted.
    """

    def render(self) -> npt.NDArray[np.uint8]:
        """Decode, rotate upright, resize and crop: uint8 (crop, crop, 3). Only once: it closes the image.

        Raises TooManyPixels or BadImage.
        """
        image = self.image
        try:
            box = _draft(image, self.preprocessing)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb_crop(image, box, self.preprocessing)
        except Image.DecompressionBombError as error:
            raise TooManyPixels(f"a frame of the image exceeds the limit of {self.max_pixels:,} pixels") from error
        except _DAMAGED as error:
            raise BadImage(f"the image is damaged: {error}") from error
        finally:
            # `with` would keep the decoded pixels as long as this object lives.
            image.close()


def _work(image: ImageFile.ImageFile, data: bytes, *, max_pixels: int) -> int:
    """Check the limits; see OpenedImage.pixels. Raises TooManyPixels or BadImage."""
    width, height = image.size
    if width * height > max_pixels:
        raise TooManyPixels(f"the image is {width} × {height}; the limit is {max_pixels:,} pixels: make it smaller")
    if image.format not in JPEG:
        return OTHER_FORMATS * width * height
    # Each scan of a progressive JPEG is a pass over all pixels, and a small file can hold thousands. The count is an
    # upper bound: compressed data never contains this marker, but metadata or a video behind the picture may. Pillow
    # has read up to the first scan, so markers in the metadata before it, as of a thumbnail, are counted apart.
    header = image.fp.tell() if image.fp else 0
    further_scans = data.count(_JPEG_SCAN, header)
    if (data.count(_JPEG_SCAN, 0, header) + further_scans) * width * height > _MAX_JPEG_WORK:
        raise BadImage("the image is damaged: too many JPEG scans for its size")
    return width * height * (_SCANS_A_PIXEL + further_scans) // _SCANS_A_PIXEL


def _draft(image: ImageFile.ImageFile, preprocessing: Preprocessing) -> _Box | None:
    """Have a JPEG that is much larger than needed decoded at 1/2, 1/4 or 1/8 of its size.

    Returns the box of the whole picture within the upright decoded pixels: their number is rounded up, so only a
    fraction of the last row and column may belong to it. None if nothing is drafted, as for all other formats.
    """
    enough = DRAFT_MARGIN * preprocessing.resize
    if image.format not in JPEG or min(image.size) < 2 * enough:
        return None
    drafted = image.draft(None, (enough, enough))
    if drafted is None:
        return None
    _, (_, _, width, height) = drafted
    right, bottom = image.width - width, image.height - height
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation in (5, 6, 7, 8):
        width, height, right, bottom = height, width, bottom, right
    left = right if orientation in (2, 3, 6, 7) else 0.0
    top = bottom if orientation in (3, 4, 7, 8) else 0.0
    return left, top, left + width, top + height


def _to_rgb_crop(image: Image.Image, box: _Box | None, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Resize before converting, so that a large image is not held in memory several times.

    `box`: the picture in a drafted JPEG, which is neither transparent nor grey of more than 8 bits.
    """
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit grey to white.
        grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return _resize_and_crop(grey.convert("RGB"), preprocessing)
    if image.mode in ("I", "F"):
        _, top = cast(tuple[float, float], image.getextrema())
        # 32-bit grey has no agreed range: 0..1 as floats, 0..255 where it fits, else 0..65535.
        scale = 1.0 if top <= 255 else 255 / 65535
        if image.mode == "F" and top <= 1.0:
            scale = 255.0
        small = np.nan_to_num(_resize_and_crop(image.convert("F"), preprocessing), posinf=0.0, neginf=0.0)
        grey = Image.fromarray((small * scale).clip(0, 255).round().astype(np.uint8))
        return np.asarray(grey.convert("RGB"))
    if image.has_transparency_data:
        # Pillow weighs colours by alpha when it resizes RGBA, so invisible colours do not bleed into visible ones.
        layer = Image.fromarray(_resize_and_crop(image.convert("RGBA"), preprocessing))
        background = Image.new("RGBA", layer.size, (*_BACKGROUND, 255))
        return np.asarray(Image.alpha_composite(background, layer).convert("RGB"))
    return _resize_and_crop(image if image.mode == "RGB" else image.convert("RGB"), preprocessing, box)


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing, box: _Box | None = None) -> npt.NDArray[Any]:
    """Shorter side to `resize`, then the centre `crop` × `crop`: exactly torchvision's Resize and CenterCrop."""
    x0, y0, x1, y1 = box or (0, 0, *image.size)
    sides = x1 - x0, y1 - y0
    crop, shorter = preprocessing.crop, min(sides)
    # The sides of a drafted picture are exact in binary, so they give the same numbers as those of the whole one.
    width, height = (int(preprocessing.resize * side / shorter) for side in sides)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    filter_ = Image.Resampling[preprocessing.interpolation.upper()]
    if max(width, height) <= _MAX_STRETCH * preprocessing.resize:
        if image.size != (width, height):
            image = image.resize((width, height), filter_, box)
        image = image.crop((left, top, left + crop, top + crop))
    else:
        # A strip of one pixel by a million would be huge when resized as a whole. The same region alone differs only by
        # rounding.
        x, y = sides[0] / width, sides[1] / height
        region = (x0 + left * x, y0 + top * y, x0 + (left + crop) * x, y0 + (top + crop) * y)
        image = image.resize((crop, crop), filter_, region)
    return np.asarray(image)
