"""How much work decoding an image will take, estimated from its header alone, before a decoder sees it.

    work = decoded pixels + bytes + 15,000

in pixels of a JPEG, of about 10 ns each. For 80 photos of 9,000 to 22 million pixels and models of 32 and 224 pixels,
half of the predictions were within 5 % of the measured CPU time, and nine of ten within 40 %.

The numbers are what the file claims. `service.images` verifies them, and enforces all limits, when it opens the image.
"""

import io
import struct
import time

import numpy as np
from PIL import Image

from service.images import LARGE_PIXELS, MAX_PIXELS, ImageRules, OpenedImage, draft_scale
from service.manifest import Preprocessing

FIXED_WORK = 15_000
"""Opening an image, resizing it and handing it over: 0.15 ms."""

_OTHER_FORMATS = 2
"""Cost of a pixel of a PNG, GIF, BMP or WebP, in pixels of a JPEG, as far as its size alone tells."""

_REPETITIONS = 5

_MAX_SEGMENTS = 256
"""Segments and fill bytes of a JPEG to walk in search of its size: a 3 MB colour profile has 50."""

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers of a frame, which holds the size: all of 0xC0 to 0xCF except those of tables."""
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_PROGRESSIVE_FRAMES = frozenset({0xC2, 0xC6, 0xCA, 0xCE})


def work_of_bytes(count: int) -> int:
    """The least work that images of `count` bytes can take."""
    return count + FIXED_WORK


def least_works(count: int) -> list[int]:
    """The same, split into pieces that each count as small: the bytes may be those of many images, or of one."""
    pieces, rest = divmod(work_of_bytes(count), LARGE_PIXELS)
    return [LARGE_PIXELS] * pieces + [rest]


def work_of(data: bytes, preprocessing: Preprocessing, rules: ImageRules) -> int:
    """Work of decoding an encoded image; that of its bytes alone if its size cannot be read, or breaks the rules."""
    pixels = 0
    try:
        if data[:2] == b"\xff\xd8":
            width, height, progressive = _jpeg(data)
            pixels = width * height // draft_scale(width, height, preprocessing, rules) ** 2
            if progressive:
                # Every scan is a pass over all pixels, even if few of them are decoded: encoders write about ten scans.
                pixels += width * height
        else:
            width, height = _size(data)
            pixels = _OTHER_FORMATS * width * height
    except (IndexError, struct.error):
        # Cut short within its header.
        return work_of_bytes(len(data))
    if not 0 < width * height <= rules.max_pixels:
        # It is refused when it is opened.
        return work_of_bytes(len(data))
    return pixels + work_of_bytes(len(data))


def seconds_per_pixel(*, exact: bool = False) -> float:
    """Seconds that this machine takes at present for each pixel of work, measured on a picture of 0.3 megapixels.

    `exact`: as in ImageRules.
    """
    coarse = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((640, 480)).save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    preprocessing = Preprocessing(resize=256, crop=224, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    rules, taken = ImageRules(max_pixels=MAX_PIXELS, exact=exact), []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        rules.open(data, preprocessing).render()
        taken.append(time.perf_counter() - started)
    return min(taken) / work_of(data, preprocessing, rules)


def work_of_opened(opened: OpenedImage, count: int) -> int:
    """The same for an opened image of `count` bytes, whose size and scans are known for certain."""
    size = opened.header.width * opened.header.height
    return opened.pixels - (size - size // opened.draft_scale**2) + work_of_bytes(count)


def _jpeg(data: bytes) -> tuple[int, int, bool]:
    """Width, height, and whether it is progressive; zeros if there is no frame."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        if data[at] == data[at + 1] == 0xFF:
            # A fill byte counts as a segment: there may be millions of them.
            at += 1
            continue
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height, marker in _PROGRESSIVE_FRAMES
        if marker in _WITHOUT_LENGTH:
            at += 2
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return 0, 0, False


def _size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG, GIF, BMP or WebP; zeros for anything else."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return struct.unpack_from(">II", data, 16)
    if data[:4] == b"GIF8":
        return struct.unpack_from("<HH", data, 6)
    if data[:2] == b"BM":
        if data[14] == 12:
            return struct.unpack_from("<HH", data, 18)
        width, height = struct.unpack_from("<ii", data, 18)
        return abs(width), abs(height)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    return 0, 0


def _webp(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return width, height
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0
