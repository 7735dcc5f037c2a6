"""What is known of an image before a decoder sees it, and the limits that hold for every format."""

from collections.abc import Callable
from dataclasses import dataclass

from service.errors import BadImage, TooManyPixels

Bytes = bytes | memoryview

MAX_PIXELS = 178_956_970
"""Pillow refuses images of more pixels, whatever limit `decode` is given."""

MAX_SIDE = 65_535
"""Longest side in pixels, that of the longest JPEG: decoders take memory per row, whatever a row holds."""

MAX_PARTS = 20_000
"""Most segments, chunks or blocks that are looked at in one file: 20 MB of a PNG in chunks of a kilobyte.

A file with more of them takes longer to read than to decode.
"""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image will cost, from its first bytes."""

    format: str
    """One of FORMATS."""
    width: int
    height: int
    """As stored, before it is turned upright."""
    work_pixels: int
    """Work of decoding it whole, in pixels of a baseline JPEG: 10 ms of CPU for a million of them on a 2-core machine.

    An upper bound: what drafting saves is not subtracted, and hostile files are charged for their worst case.
    """
    decoded_bytes: int
    """Upper bound of the memory that decoding and resizing take at their peak, without the file itself."""


@dataclass(frozen=True, slots=True)
class Scan:
    """A file after the scan of its structure."""

    header: ImageHeader
    pieces: tuple[Bytes, ...]
    """What the decoder gets: the file without its metadata, to be joined."""
    orientation: Callable[[], int] | None
    """EXIF orientation, 1 to 8; None: the container has it, and the decoder reads it from there."""

    def rewritten(self) -> bytes:
        """The file without its metadata."""
        return b"".join(self.pieces)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise BadImage or TooManyPixels if images of this size are not decoded."""
    if width <= 0 or height <= 0:
        raise BadImage(f"the image is damaged: it claims to be {width} × {height}")
    if width * height > max_pixels:
        raise TooManyPixels(f"the image is {width} × {height}; the limit is {max_pixels:,} pixels: make it smaller")
    if max(width, height) > MAX_SIDE:
        raise TooManyPixels(f"the image is {width} × {height}; the limit of a side is {MAX_SIDE:,} pixels: cut it")


def damaged(what: str) -> BadImage:
    """An error to raise."""
    return BadImage(f"the image is damaged: {what}")
