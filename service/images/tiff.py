"""Scan of a TIFF: its first directory. The decoder gets a directory of the tags that define the pixels, and no other.

So neither Pillow nor libtiff sees metadata, tags of odd types or further pictures, and strips and tiles are counted.
"""

import struct
from collections.abc import Mapping
from functools import partial

import numpy as np

from service.errors import BadImage, TooManyPixels, UnsupportedImage
from service.images import exif, jpeg
from service.images.exif import INTEGERS, SIZES, Entry, Layout
from service.images.header import Bytes, ImageHeader, Scan, check_size, damaged

_MAX_TAGS = 1_000
"""Tags of the first directory; scanners and microscopes write up to a hundred."""
_MAX_BLOCKS = 20_000
"""Strips and tiles: each costs Pillow up to 20 µs, whatever it holds."""
_WORK_BLOCK = 1_000
"""Cost of a strip or tile itself, in pixels of a JPEG."""
_MAX_SAMPLES, _MAX_BITS = 8, 64
_BYTES = 16
"""Bytes of a pixel, as in a PNG with alpha; the buffer for a strip or tile comes on top."""

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _XMP = 322, 323, 324, 325, 700

_LARGEST = {
    **dict.fromkeys((_WIDTH, _HEIGHT, _COMPRESSION, _SAMPLES, _ROWS, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT), 1),
    **dict.fromkeys((266, 292, 293, 317, 332, 512, 513, 514, 515, 531), 1),
    **dict.fromkeys((_BITS, _PHOTOMETRIC, 338, 339, 519, 520, 521, 529, 530, 532), _MAX_SAMPLES),
    **dict.fromkeys((_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES), _MAX_BLOCKS),
    320: 3 << 16,  # palette
    347: 1 << 16,  # JPEG tables
}
"""The tags that define the pixels, and how many values they may have."""
_KINDS = frozenset({*INTEGERS, 5, 7})
"""Whole numbers, ratios and bytes without a type."""

_UNCOMPRESSED = (1, 32771)
_JPEG, _WEBP, _LZMA = (6, 7), 50001, 34925
_WORK = {1: 2, _LZMA: 8, _WEBP: 6}
_WORK_OTHERS = 3
"""Cost of a pixel by compression, in pixels of a JPEG."""

COMPRESSIONS = {
    1: "none", 2: "CCITT RLE", 3: "CCITT group 3", 4: "CCITT group 4", 5: "LZW", 6: "JPEG", 7: "JPEG", 8: "Deflate",
    32771: "none", 32773: "PackBits", 32809: "ThunderScan", 32946: "Deflate", 34676: "SGILog", 34677: "SGILog24",
    _LZMA: "LZMA", 50000: "Zstandard", _WEBP: "WebP",
}  # fmt: skip
"""What Pillow's libtiff unpacks."""


def scan(data: bytes, max_pixels: int) -> Scan:
    """Raises BadImage, UnsupportedImage or TooManyPixels."""
    form = exif.layout(data)
    if form is None:
        raise damaged("its header is cut off")
    try:
        tags = _tags(data, form)
        values = {tag: exif.number(data, form, found) for tag, found in tags.items() if tag in _LARGEST}
        header = _header(data, form, tags, values, max_pixels)
        xmp = tags.get(_XMP)
        turned = exif.number(data, form, tags[exif.ORIENTATION]) if exif.ORIENTATION in tags else None
    except struct.error as error:
        raise damaged("its directory is cut off") from error
    packet = None if xmp is None else memoryview(data)[xmp.values_at : xmp.values_at + xmp.values]
    kept = sorted(found for tag, found in tags.items() if tag in _LARGEST)
    return Scan(header, _rewritten(data, form, kept), partial(_orientation, turned, packet))


def _tags(data: bytes, form: Layout) -> dict[int, Entry]:
    """The first entry of each tag in the first directory whose values are within the file."""
    at, count = exif.first_directory(data, form)
    if count > _MAX_TAGS:
        raise BadImage(f"the image has {count:,} tags; the limit is {_MAX_TAGS:,}: remove its metadata")
    tags: dict[int, Entry] = {}
    for place in range(at, at + count * form.entry_bytes, form.entry_bytes):
        found = exif.entry(data, form, place)
        most = _LARGEST.get(found.tag)
        if most is None and found.tag not in (exif.ORIENTATION, _XMP):
            continue
        if most is not None and found.values > most:
            raise BadImage(f"the image has {found.values:,} values in TIFF tag {found.tag}; the limit is {most:,}")
        if found.kind in _KINDS and found.values_at + found.values * SIZES[found.kind] <= len(data):
            tags.setdefault(found.tag, found)
    return tags


def _header(
    data: bytes, form: Layout, tags: Mapping[int, Entry], values: Mapping[int, int | None], max_pixels: int
) -> ImageHeader:
    width, height = values.get(_WIDTH), values.get(_HEIGHT)
    if width is None or height is None:
        raise damaged("it has no size")
    check_size(width, height, max_pixels)
    compression = values.get(_COMPRESSION) or 1
    if compression not in COMPRESSIONS:
        raise UnsupportedImage(
            f"a TIFF with an unknown compression ({compression}): save it with LZW, Deflate, JPEG or none"
        )
    samples, bits = values.get(_SAMPLES) or 1, values.get(_BITS) or 1
    if samples > _MAX_SAMPLES or bits > _MAX_BITS:
        raise UnsupportedImage(f"a TIFF of {samples} samples of {bits} bits for a pixel: save it as 8-bit RGB")
    planes = samples if values.get(_PLANAR) == 2 else 1
    if _TILE_WIDTH in tags or (_TILES in tags and _STRIPS not in tags):
        across_px, down_px = values.get(_TILE_WIDTH) or 0, values.get(_TILE_HEIGHT) or 0
        what, offsets = "tiles", tags.get(_TILES) or tags.get(_STRIPS)
        if across_px <= 0 or down_px <= 0:
            raise damaged("its tiles have no size")
    else:
        across_px, down_px = width, min(values.get(_ROWS) or height, height)
        what, offsets = "strips", tags.get(_STRIPS)
    across, down = -(-width // across_px), -(-height // down_px)
    covered = across * across_px * down * down_px
    if covered > max_pixels and what == "tiles":
        raise TooManyPixels(f"the image's tiles have {covered:,} pixels; the limit is {max_pixels:,}: use smaller ones")
    blocks = across * down * planes
    if blocks > _MAX_BLOCKS:
        raise BadImage(f"the image has {blocks:,} {what}; the limit is {_MAX_BLOCKS:,}: save it with larger ones")
    if offsets is not None and offsets.values > blocks and (blocks > 1 or planes > 1):
        # Pillow would decode them all.
        raise damaged(f"it has {offsets.values:,} {what}, of which {blocks:,} make the picture")
    work = covered * _WORK.get(compression, _WORK_OTHERS) + blocks * _WORK_BLOCK
    if compression not in _UNCOMPRESSED:
        _check_overlap(data, form, tags.get(_TILE_BYTES) or tags.get(_STRIP_BYTES), what)
    if compression in _JPEG:
        # Every strip and tile is a JPEG, and libtiff gives up on a strip with too many scans.
        scans = min(jpeg.count_scan_markers(data), jpeg.MAX_SCANS * blocks)
        work += across_px * down_px * scans // 10
    block_bytes = across_px * down_px * max(4, -(-samples * bits // 8))
    return ImageHeader("TIFF", width, height, work, _BYTES * width * height + block_bytes)


def _check_overlap(data: bytes, form: Layout, lengths: Entry | None, what: str) -> None:
    """Refuse strips that share their bytes: they would make a small file as much work as a large one."""
    if lengths is None or lengths.kind not in INTEGERS:
        return
    letter = form.endian + INTEGERS[lengths.kind].lower().replace("b", "u1").replace("h", "u2")
    letter = letter.replace("i", "u4").replace("q", "u8")
    total = np.frombuffer(data, letter, lengths.values, lengths.values_at).sum(dtype=np.float64)
    if lengths.values > 1 and total > len(data):
        raise damaged(f"its {what} overlap")


def _rewritten(data: bytes, form: Layout, kept: list[Entry]) -> tuple[Bytes, ...]:
    """The file with a new directory at its end: all other offsets stay as they are."""
    view, padding = memoryview(data), b"\0" * (len(data) % 2)
    at, start = len(data) + len(padding), 8 if form.big else 4
    offset = form.endian + ("Q" if form.big else "I")
    directory = struct.pack(form.endian + ("Q" if form.big else "H"), len(kept))
    entries = (view[found.at : found.at + form.entry_bytes] for found in kept)
    end = struct.pack(offset, 0)
    return view[:start], struct.pack(offset, at), view[2 * start :], padding, directory, *entries, end


def _orientation(turned: int | None, xmp: Bytes | None) -> int:
    if turned is None and xmp is not None:
        turned = exif.from_xmp(xmp)
    return turned if turned is not None and 1 <= turned <= 8 else 1
