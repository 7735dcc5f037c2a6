"""The scan of a file's structure, before Pillow sees it: its format, its size, and what decoding it will cost at most.

It reads each byte of the structure once, and those of the picture only where their number of passes matters. Files that
would cost more than the limits are refused here. Decoders get files that were rewritten without metadata, so that
neither its parsing nor its size costs anything.
"""

import struct
from collections.abc import Callable, Collection

from service.errors import BadImage, TooManyPixels, UnsupportedImage
from service.images import avif, bmp, gif, jpeg, png, tiff, webp
from service.images.header import Scan
from service.images.sniff import FORMATS, image_format, what_else

_MAX_WORK = 12
"""Most work of an image, in multiples of that of a JPEG of `max_pixels`: 6 s of CPU for 50 megapixels.

A PNG with alpha costs six, a progressive JPEG two and at most eleven, a TIFF with LZMA eight.
"""

_SCANS: dict[str, Callable[[bytes, int], Scan]] = {
    "JPEG": jpeg.scan,
    "PNG": png.scan,
    "WEBP": webp.scan,
    "GIF": gif.scan,
    "BMP": bmp.scan,
    "TIFF": tiff.scan,
    "AVIF": avif.scan,
}


def scan(data: bytes, *, max_pixels: int, formats: Collection[str] = FORMATS, max_bytes: int | None = None) -> Scan:
    """Scan a file without decoding anything; microseconds for a photo.

    Raises UnsupportedImage, TooManyPixels or BadImage, as `decode` would before it decodes.
    """
    if not data:
        raise BadImage("the image is empty: send its bytes as the body")
    name = image_format(data)
    if name is None or name not in formats:
        raise UnsupportedImage(_not_accepted(data, name, formats))
    try:
        scanned = _SCANS[name](data, max_pixels)
    except (struct.error, LookupError, ValueError, OverflowError) as error:
        raise BadImage("the image is damaged: its header is cut off") from error
    header = scanned.header
    size = f"the image is {header.width} × {header.height}"
    if header.work_pixels > _MAX_WORK * max_pixels:
        raise TooManyPixels(f"{size}, of a kind that takes too long to decode: make it smaller, or save it as a PNG")
    if max_bytes is not None and header.decoded_bytes > max_bytes:
        raise TooManyPixels(
            f"{size}; decoding it takes up to {header.decoded_bytes / 1e6:,.0f} MB of memory, and the limit is "
            f"{max_bytes / 1e6:,.0f} MB: make it smaller"
        )
    return scanned


def _not_accepted(data: bytes, name: str | None, formats: Collection[str]) -> str:
    accepted = ", ".join(format_ for format_ in FORMATS if format_ in formats)
    if name is not None:
        return f"this is {name}, which is switched off here: send {accepted}"
    known = what_else(data)
    if known is None:
        return f"not an image of a format accepted here: {accepted}"
    return f"this is {known[0]}, not an image of a format accepted here: {accepted}. Instead, {known[1]}"
