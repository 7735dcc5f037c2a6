"""From a scanned file to the model's pixels.

The rules for all formats: the first frame of an animation, EXIF orientation applied, alpha over white, 16-bit grey
scaled (not clipped) to 8 bits, the shorter side resized and the centre cropped, all as RGB.
"""

import ctypes
import io
import struct
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin, ExifTags, Image, ImageFile, UnidentifiedImageError, _imaging

from service.errors import BadImage, NotReady, TooManyPixels
from service.images.header import ImageHeader, Scan
from service.images.memory import MemoryBudget
from service.images.scan import scan
from service.images.sniff import FORMATS
from service.manifest import Preprocessing

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
    RuntimeError,
    struct.error,
)

_BACKGROUND = (255, 255, 255)

LARGE_PIXELS = 2_000_000
"""Decoding work, as in ImageHeader.work_pixels, above which an image is large: small ones should not wait for it.

At 10 ms of CPU per megapixel smaller images take about 20 ms, at worst 40; docs/images.md has times of larger ones.
"""

SMALL_BYTES = 32 * LARGE_PIXELS
"""Images that take no more memory than this do not wait for it."""

_DRAFT_MARGIN = 3
"""A JPEG is decoded at 1/2, 1/4 or 1/8 if its shorter side is then still this many times `resize`.

docs/images.md has the differences that were measured for margins from 1 to 4.
"""

_MAX_STRETCH = 8
"""Images with a larger aspect ratio are not resized as a whole."""

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""

_Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRules:
    """Which images are decoded, and how."""

    max_pixels: int
    """Limit of width times height, at most MAX_PIXELS."""
    formats: Collection[str] = FORMATS
    """Formats that are accepted."""
    exact: bool = False
    """Give torchvision's pixels. By default a JPEG that is much too large is decoded at a fraction of its size, and of
    images without alpha only the region that the crop keeps is resized."""
    memory: MemoryBudget | None = None
    """Memory that all images decoded at once may take; None: no limit."""

    def open(self, data: bytes, preprocessing: Preprocessing) -> "OpenedImage":
        """Scan the file and check all limits, without decoding. Raises UnsupportedImage, TooManyPixels or BadImage."""
        return OpenedImage(scan=self._scan(data), preprocessing=preprocessing, rules=self)

    def _scan(self, data: bytes) -> Scan:
        memory = self.memory
        return scan(
            data,
            max_pixels=self.max_pixels,
            formats=self.formats,
            max_bytes=None if memory is None else memory.limit_bytes,
        )


def decode(data: bytes, preprocessing: Preprocessing, *, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Encoded image -> uint8 (crop, crop, 3), RGB, exactly as it is served by default.

    `max_pixels`: limit of width times height, at most MAX_PIXELS. Raises UnsupportedImage, TooManyPixels or BadImage.
    """
    return open_image(data, preprocessing, max_pixels=max_pixels).render()


def open_image(data: bytes, preprocessing: Preprocessing, *, max_pixels: int) -> "OpenedImage":
    """Scan the file and check all limits, without decoding. Raises as `decode`."""
    return ImageRules(max_pixels=max_pixels).open(data, preprocessing)


def draft_scale(width: int, height: int, preprocessing: Preprocessing, rules: ImageRules) -> int:
    """By how much the sides of a JPEG are divided while it is decoded: 1, 2, 4 or 8."""
    if rules.exact:
        return 1
    enough = _DRAFT_MARGIN * preprocessing.resize
    return next(scale for scale in (8, 4, 2, 1) if min(width, height) >= scale * enough or scale == 1)


@dataclass(slots=True, kw_only=True, eq=False)
class OpenedImage:
    """An image within the limits. It holds the file only, so that waiting to be rendered costs nothing."""

    scan: Scan
    preprocessing: Preprocessing
    rules: ImageRules

    @property
    def header(self) -> ImageHeader:
        """Format, size and cost."""
        return self.scan.header

    @property
    def pixels(self) -> int:
        """Work of decoding it whole; see ImageHeader.work_pixels."""
        return self.scan.header.work_pixels

    @property
    def draft_scale(self) -> int:
        """By how much a JPEG's sides are divided while it is decoded: 1, 2, 4 or 8."""
        header = self.scan.header
        if header.format != "JPEG":
            return 1
        return draft_scale(header.width, header.height, self.preprocessing, self.rules)

    @property
    def decoded_bytes(self) -> int:
        """Upper bound of the memory that `render` takes at its peak, without the file itself."""
        header, scale = self.scan.header, self.draft_scale
        drafted = -(-header.width // scale) * -(-header.height // scale)
        # For each pixel that is left out: its decoded bytes and those of the turned copy.
        return header.decoded_bytes - 8 * (header.width * header.height - drafted)

    def render(self) -> npt.NDArray[np.uint8]:
        """Decode, rotate upright, resize and crop: uint8 (crop, crop, 3). Waits for room in the memory budget.

        Raises TooManyPixels, BadImage, or NotReady if the machine has not enough memory at present.
        """
        needed, memory = self.decoded_bytes, self.rules.memory
        # Without waiting: the number of decoders bounds what small images take.
        if memory is None or needed <= SMALL_BYTES:
            return self._decode()
        with memory.hold(needed):
            return self._decode()

    def _decode(self) -> npt.NDArray[np.uint8]:
        try:
            with _open(self.scan) as image:
                return self._render(image)
        except Image.DecompressionBombError as error:
            limit = self.rules.max_pixels
            raise TooManyPixels(f"a frame of the image exceeds the limit of {limit:,} pixels") from error
        except UnidentifiedImageError as error:
            kind = self.header.format
            raise BadImage(f"the image is damaged, or a rare kind of {kind}: save it again") from error
        except MemoryError as error:
            raise NotReady("too little memory for this image at present: retry") from error
        except _DAMAGED as error:
            raise BadImage(f"the image is damaged: {error}") from error

    def _render(self, image: ImageFile.ImageFile) -> npt.NDArray[np.uint8]:
        turned = self.scan.orientation
        orientation = image.getexif().get(ExifTags.Base.Orientation) if turned is None else turned()
        box = _draft(image, self.draft_scale, orientation)
        image.load()
        if orientation in _TRANSPOSE:
            upright = image.transpose(_TRANSPOSE[orientation])
            # Do not hold both at once.
            image.close()
            return self._to_rgb_crop(upright, box)
        return self._to_rgb_crop(image, box)

    def _to_rgb_crop(self, image: Image.Image, box: _Box | None) -> npt.NDArray[np.uint8]:
        """Resize before converting, so that a large image is not held in memory several times.

        `box`: the picture in a drafted JPEG, which is neither transparent nor grey of more than 8 bits.
        """
        if image.mode.startswith("I;16"):
            # Pillow would clip 16-bit grey to white, and has no alpha for it.
            deep = np.asarray(image)
            grey = Image.fromarray((deep >> 8).astype(np.uint8))
            transparent = image.info.get("transparency")
            if transparent is None:
                return self._resize_and_crop(grey.convert("RGB"))
            alpha = Image.fromarray(np.where(deep == transparent, 0, 255).astype(np.uint8))
            return self._over_background(Image.merge("LA", (grey, alpha)))
        if image.mode in ("I", "F"):
            _, top = cast(tuple[float, float], image.getextrema())
            # 32-bit grey has no agreed range: 0..1 as floats, 0..255 where it fits, else 0..65535.
            scale = 1.0 if top <= 255 else 255 / 65535
            if image.mode == "F" and top <= 1.0:
                scale = 255.0
            small = np.nan_to_num(self._resize_and_crop(image.convert("F")), posinf=0.0, neginf=0.0)
            grey = Image.fromarray((small * scale).clip(0, 255).round().astype(np.uint8))
            return np.asarray(grey.convert("RGB"))
        if image.has_transparency_data:
            return self._over_background(image)
        return self._resize_and_crop(image if image.mode == "RGB" else image.convert("RGB"), box)

    def _over_background(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        # Pillow weights colours by alpha when it resizes RGBA, so invisible colours do not bleed into visible ones.
        layer = Image.fromarray(self._resize_and_crop(image.convert("RGBA")))
        background = Image.new("RGBA", layer.size, (*_BACKGROUND, 255))
        return np.asarray(Image.alpha_composite(background, layer).convert("RGB"))

    def _resize_and_crop(self, image: Image.Image, box: _Box | None = None) -> npt.NDArray[Any]:
        """Shorter side to `resize`, then the centre `crop` × `crop`, as torchvision's Resize and CenterCrop."""
        x0, y0, x1, y1 = box or (0, 0, *image.size)
        sides = x1 - x0, y1 - y0
        crop, resize, shorter = self.preprocessing.crop, self.preprocessing.resize, min(sides)
        # The sides of a drafted picture are exact in binary, so they give the same numbers as those of the whole one.
        width, height = (int(resize * side / shorter) for side in sides)
        left, top = round((width - crop) / 2), round((height - crop) / 2)
        filter_ = Image.Resampling[self.preprocessing.interpolation.upper()]
        # What the crop keeps. Pillow takes it as 32-bit floats, and only their rounding makes a region differ.
        x, y = sides[0] / width, sides[1] / height
        columns = x0 + left * x, x0 + (left + crop) * x
        rows = y0 + top * y, y0 + (top + crop) * y
        if max(width, height) > _MAX_STRETCH * resize:
            # A strip of one pixel by a million would be huge when resized as a whole, or first in one direction.
            return np.asarray(image.resize((crop, crop), filter_, (columns[0], rows[0], columns[1], rows[1])))
        # With alpha, each resizing rounds the colours anew: one is enough.
        if self.rules.exact or (width, height) == (crop, crop) or image.mode == "RGBA":
            if image.size != (width, height):
                image = image.resize((width, height), filter_, box)
            return np.asarray(image.crop((left, top, left + crop, top + crop)))
        # One direction after the other, as for a whole image. For a region Pillow may begin with the rows instead, and
        # the rounding in between shows: bicubic pixels at edges would differ by up to 22 of 255.
        image = image.resize((crop, image.height), filter_, (columns[0], 0, columns[1], image.height))
        return np.asarray(image.resize((crop, crop), filter_, (0, rows[0], crop, rows[1])))


def _open(scanned: Scan) -> ImageFile.ImageFile:
    """Open the rewritten file with Pillow."""
    kind = scanned.header.format
    if kind == "TIFF":
        _silence_libtiff()
    elif kind == "AVIF":
        # One thread per image: the pool of decoders uses the others.
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    data = scanned.rewritten()
    image = Image.open(io.BytesIO(data), formats=[kind])
    # With blocks of 64 KiB, a decoder that needs more starts over with each block: quadratic for hostile files.
    image.decodermaxblock = len(data)
    return image


@cache
def _silence_libtiff() -> None:
    """Silence libtiff, which writes a line to stderr for each fault of a file, with text that the sender can choose."""
    # Pillow's own module; the linker finds the library that it uses.
    library = ctypes.CDLL(_imaging.__file__)
    if hasattr(library, "TIFFSetErrorHandler"):
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


def _draft(image: ImageFile.ImageFile, scale: int, orientation: int | None) -> _Box | None:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 of its size.

    Returns the box of the whole picture within the upright decoded pixels: their number is rounded up, so only a
    fraction of the last row and column may belong to it. None if nothing is drafted, as for all other formats.
    """
    if scale == 1:
        return None
    drafted = image.draft(None, (image.width // scale, image.height // scale))
    if drafted is None:
        return None
    _, (_, _, width, height) = drafted
    right, bottom = image.width - width, image.height - height
    if orientation in (5, 6, 7, 8):
        width, height, right, bottom = height, width, bottom, right
    left = right if orientation in (2, 3, 6, 7) else 0.0
    top = bottom if orientation in (3, 4, 7, 8) else 0.0
    return left, top, left + width, top + height
