"""Scan of a BMP: its header."""

import struct

from service.errors import UnsupportedImage
from service.images.header import ImageHeader, Scan, check_size, damaged

_WORK = 2
"""Cost of a pixel, in pixels of a JPEG: measured below 1."""
_BYTES = 16
"""Bytes of a pixel, as in a PNG with alpha."""
_RUN_LENGTHS = (1, 2)
_MAX_RUNS_BYTES = 2_000_000
"""Pillow unpacks run lengths in Python: 0.3 µs per byte, as long as thirty pixels of a JPEG."""
_WORK_RUN_BYTE = 30


def scan(data: bytes, max_pixels: int) -> Scan:
    """Raises BadImage, UnsupportedImage or TooManyPixels."""
    try:
        (header_bytes,) = struct.unpack_from("<I", data, 14)
        compression = 0
        if header_bytes == 12:
            width, height = struct.unpack_from("<HH", data, 18)
        else:
            width, height, _, _, compression = struct.unpack_from("<IIHHI", data, 18)
            if height >> 24 == 0xFF:
                # A negative height: from top to bottom.
                height = 2**32 - height
    except struct.error as error:
        raise damaged("its header is cut off") from error
    if header_bytes > 1_000:
        raise damaged(f"a header of {header_bytes:,} bytes")
    check_size(width, height, max_pixels)
    work = _WORK * width * height
    if compression in _RUN_LENGTHS:
        if len(data) > _MAX_RUNS_BYTES:
            raise UnsupportedImage(
                f"a BMP whose run lengths take more than {_MAX_RUNS_BYTES:,} bytes: send it as a PNG"
            )
        work += _WORK_RUN_BYTE * len(data)
    return Scan(ImageHeader("BMP", width, height, work, _BYTES * width * height), (data,), lambda: 1)
