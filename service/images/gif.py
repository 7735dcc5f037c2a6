"""Scan of a GIF up to its first frame. Comments, animation and other extensions are left out."""

from service.errors import BadImage
from service.images.header import MAX_PARTS, ImageHeader, Scan, check_size, damaged

_EXTENSION, _FRAME, _CONTROL = 0x21, 0x2C, 0xF9
_WORK = 2
"""Cost of a pixel, in pixels of a JPEG: measured 1.1."""
_BYTES = 17
"""Bytes of a pixel: an index, and as in a PNG with alpha."""


def scan(data: bytes, max_pixels: int) -> Scan:
    """Raises BadImage or TooManyPixels."""
    view = memoryview(data)
    at = 13 + _palette_bytes(data, 10)
    screen, transparent = view[:at], None
    parts = 0
    while (kind := data[at : at + 1]) != b",":
        parts += 1
        if kind in (b"", b";"):
            raise damaged("it has no picture")
        if kind == b"!":
            label, at = data[at + 1 : at + 2], at + 2
            if label == b"\xf9" and data[at : at + 1] >= b"\4" and len(data) > at + 4 and data[at + 1] & 1:
                transparent = data[at + 4]
            while at < len(data) and data[at] and parts <= MAX_PARTS:
                at, parts = at + 1 + data[at], parts + 1
        at += 1
        if parts > MAX_PARTS:
            raise BadImage(f"the image has more than {MAX_PARTS:,} blocks before the picture: remove its comments")
    if len(data) < at + 10:
        raise damaged("it ends before the picture")
    left, top, frame_width, frame_height = (int.from_bytes(data[i : i + 2], "little") for i in range(at + 1, at + 9, 2))
    width = max(int.from_bytes(data[6:8], "little"), left + frame_width)
    height = max(int.from_bytes(data[8:10], "little"), top + frame_height)
    check_size(width, height, max_pixels)
    pixels = width * height
    control = b"" if transparent is None else bytes([_EXTENSION, _CONTROL, 4, 1, 0, 0, transparent, 0])
    header = ImageHeader("GIF", width, height, _WORK * pixels, _BYTES * pixels)
    return Scan(header, (screen, control, view[at:]), lambda: 1)


def _palette_bytes(data: bytes, flags_at: int) -> int:
    if len(data) < 13:
        raise damaged("it ends before the picture")
    flags = data[flags_at]
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
