"""Scan of a WebP: from chunk to chunk. The decoder gets the first frame, without metadata."""

import struct
from functools import partial

from service.errors import BadImage
from service.images.exif import orientation
from service.images.header import MAX_PARTS, Bytes, ImageHeader, Scan, check_size, damaged

_CHUNK = struct.Struct("<4sI")
_WORK, _WORK_ALPHA = 3, 6
"""Cost of a pixel, in pixels of a JPEG."""
_WORK_BYTE = 3
"""Cost of a byte of the picture."""
_BYTES = 28
"""Bytes of a pixel: two canvases of the animation's decoder, a copy, and as in a PNG with alpha."""
_ALPHA, _EXIF, _XMP, _ANIMATED = 0x10, 0x08, 0x04, 0x02
"""Flags of the extended header."""


def scan(data: bytes, max_pixels: int) -> Scan:
    """Raises BadImage or TooManyPixels."""
    size = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    kind, flags = data[12:16], 0
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[i : i + 3], "little") for i in (24, 27))
        flags = data[20] if size >= 30 else 0
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(data[i : i + 2], "little") & 0x3FFF for i in (26, 28))
    if size < 30 and (kind != b"VP8L" or size < 25):
        raise damaged("its header is cut off")
    check_size(width, height, max_pixels)
    picture, exif, xmp = _chunks(memoryview(data)[:size], flags)
    if kind == b"VP8X":
        # No colour profile, no metadata.
        picture.insert(0, _CHUNK.pack(b"VP8X", 10) + bytes([flags & (_ALPHA | _ANIMATED)]) + data[21:30])
    content = sum(len(part) for part in picture)
    pixels = width * height
    header = ImageHeader(
        "WEBP",
        width,
        height,
        (_WORK_ALPHA if kind == b"VP8L" or flags & _ALPHA else _WORK) * pixels + _WORK_BYTE * content,
        _BYTES * pixels,
    )
    return Scan(header, (b"RIFF", struct.pack("<I", 4 + content), b"WEBP", *picture), partial(orientation, exif, xmp))


def _chunks(view: memoryview, flags: int) -> tuple[list[Bytes], Bytes | None, Bytes | None]:
    """The chunks of the first frame, EXIF, and XMP."""
    picture: list[Bytes] = []
    exif: Bytes | None = None
    xmp: Bytes | None = None
    complete, at = False, 12
    for _ in range(MAX_PARTS):
        if at + 8 > len(view):
            return picture, exif, xmp
        kind, length = _CHUNK.unpack_from(view, at)
        end = at + 8 + length + (length & 1)
        if kind in (b"ANIM", b"ALPH", b"VP8 ", b"VP8L", b"ANMF") and not complete:
            picture.append(view[at:end])
            complete = kind not in (b"ANIM", b"ALPH")
            if complete and not flags & (_EXIF | _XMP):
                # An animation's other frames are not looked at.
                return picture, exif, xmp
        elif kind == b"EXIF" and flags & _EXIF and exif is None:
            exif = view[at + 8 : at + 8 + length]
        elif kind == b"XMP " and flags & _XMP and xmp is None:
            xmp = view[at + 8 : at + 8 + length]
        at = end
    raise BadImage(f"the image has more than {MAX_PARTS:,} chunks: save its first frame only")
