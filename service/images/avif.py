"""Scan of an AVIF: the boxes of ISO BMFF, and the sizes within the compressed pictures themselves.

The size that a box gives is a claim: the decoder allocates what the AV1 sequence header says.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from service.errors import BadImage, UnsupportedImage
from service.images import av1
from service.images.header import MAX_PARTS, ImageHeader, Scan, check_size, damaged

_MAX_BOXES = 4_000
_MAX_EXTENTS = 4_000
"""Extents of all items: a table can claim 65,535 for each item without holding any."""
_MAX_TABLE = 32 * 1024
"""Bytes of a table of items or frames: libavif searches some of them once for each of their entries."""
_TABLES = frozenset(
    {b"iinf", b"iloc", b"ipma", b"iref", b"grpl", b"stsz", b"stsc", b"stco", b"co64", b"stts", b"stss", b"elst"}
)
_HEADER_BYTES = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0}
"""Boxes that hold boxes, and the bytes before these."""

_WORK = 4
"""Cost of a pixel of a frame, in pixels of a JPEG: measured 2 to 4."""
_WORK_BYTE = 8
"""Cost of a byte of the picture."""
_BYTES, _FRAME_BYTES, _MAX_REFERENCES = 24, 6, 9
"""Bytes of a pixel: planes, two copies in RGBA and as in a PNG with alpha; bytes of a pixel in each frame that the
decoder keeps; and the largest number of these frames."""


@dataclass(slots=True)
class _Container:
    """What the boxes say."""

    boxes: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    items: dict[int, bytes] = field(default_factory=dict)
    """Type of each item by its number."""
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Where the bytes of an item are."""
    extent_count: int = 0
    in_idat: set[int] = field(default_factory=set)
    """Items whose extents count from the start of `idat`."""
    idat: int | None = None
    frames: list[tuple[int, int]] = field(default_factory=list)
    """Where the first frame of each track is."""
    exif_at: list[int] = field(default_factory=list)
    """Offsets of the type fields of EXIF items."""


def scan(data: bytes, max_pixels: int) -> Scan:
    """Raises BadImage, UnsupportedImage or TooManyPixels."""
    found = _Container()
    try:
        _read(data, 0, len(data), found)
    except (struct.error, IndexError) as error:
        raise damaged("its boxes are cut off") from error
    if not found.frames and b"av01" not in found.items.values():
        if any(kind in (b"hvc1", b"hev1", b"grid") for kind in found.items.values()):
            raise UnsupportedImage("this is HEIC, which is not accepted: convert it to JPEG or PNG")
        raise damaged("it has no picture")
    if not found.sizes:
        raise damaged("it has no size")
    width, height = max(found.sizes, key=lambda size: size[0] * size[1])
    check_size(width, height, max_pixels)
    area, frames, work, parts = width * height, 1, 0, MAX_PARTS
    for sequence in _pictures(data, found):
        coded = av1.scan(sequence, parts)
        parts -= coded.units
        if coded.width:
            check_size(coded.width, coded.height, max_pixels)
        frames = max(frames, coded.frames)
        area = max(area, coded.width * coded.height)
        work += _WORK * coded.width * coded.height * max(1, coded.frames) + _WORK_BYTE * len(sequence)
    kept = area * _FRAME_BYTES * min(frames, _MAX_REFERENCES)
    header = ImageHeader("AVIF", width, height, max(work, _WORK * area), _BYTES * area + kept)
    if not found.exif_at:
        return Scan(header, (data,), None)
    cleaned = bytearray(data)
    for at in found.exif_at:
        # An unknown type: the decoder ignores such an item.
        cleaned[at : at + 4] = b"skip"
    return Scan(header, (bytes(cleaned),), None)


def _boxes(
    data: bytes, start: int, end: int, found: _Container, *, outermost: bool = False
) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the content of each box."""
    while start + 8 <= end:
        found.boxes += 1
        if found.boxes > _MAX_BOXES:
            raise BadImage(f"the image has more than {_MAX_BOXES:,} boxes: save it without metadata")
        size, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1:
            (size,), header = struct.unpack_from(">Q", data, start + 8), 16
        stop = end if size == 0 else start + size
        if stop > end or stop < start + header:
            if not outermost:
                raise damaged("its boxes are cut off")
            # Bytes after the last box, such as those of a video.
            stop = end
        yield kind, start + header, stop
        start = stop


def _read(data: bytes, start: int, end: int, found: _Container, depth: int = 0) -> None:
    for kind, at, stop in _boxes(data, start, end, found, outermost=depth == 0):
        if kind in _TABLES and stop - at > _MAX_TABLE:
            raise BadImage(f"the image has a table of more than {_MAX_TABLE:,} bytes ({kind.decode()}): save it again")
        if kind in _HEADER_BYTES and depth < 8:
            _read(data, at + _HEADER_BYTES[kind], stop, found, depth + 1)
        elif kind == b"ispe":
            width, height = struct.unpack_from(">II", data, at + 4)
            found.sizes.append((width, height))
        elif kind == b"tkhd":
            width, height = struct.unpack_from(">II", data, stop - 8)
            found.sizes.append((width >> 16, height >> 16))
        elif kind == b"iinf":
            _read_items(data, at, stop, found)
        elif kind == b"iloc":
            _read_extents(data, at, stop, found)
        elif kind == b"idat" and found.idat is None:
            found.idat = at
        elif kind == b"stsz":
            size, count = struct.unpack_from(">II", data, at + 4)
            if count:
                found.frames.append((0, size or struct.unpack_from(">I", data, at + 12)[0]))
        elif kind in (b"stco", b"co64") and found.frames:
            (offset,) = struct.unpack_from(">I" if kind == b"stco" else ">Q", data, at + 8)
            found.frames[-1] = offset, found.frames[-1][1]


def _read_items(data: bytes, at: int, stop: int, found: _Container) -> None:
    for kind, start, end in _boxes(data, at + (6 if data[at] == 0 else 8), stop, found):
        if kind != b"infe" or end - start < 12:
            continue
        number_bytes = 4 if data[start] > 2 else 2
        number = int.from_bytes(data[start + 4 : start + 4 + number_bytes])
        type_at = start + 4 + number_bytes + 2
        item = data[type_at : type_at + 4]
        found.items[number] = item
        if item == b"Exif":
            found.exif_at.append(type_at)


def _read_extents(data: bytes, at: int, stop: int, found: _Container) -> None:
    version = data[at]
    offset_bytes, length_bytes = data[at + 4] >> 4, data[at + 4] & 15
    base_bytes, index_bytes = data[at + 5] >> 4, data[at + 5] & 15 if version else 0
    wide = 4 if version == 2 else 2
    count, at = int.from_bytes(data[at + 6 : at + 6 + wide]), at + 6 + wide
    for _ in range(count):
        if at >= stop:
            raise damaged("its boxes are cut off")
        item, at = int.from_bytes(data[at : at + wide]), at + wide
        if version:
            if data[at + 1] & 15:
                found.in_idat.add(item)
            at += 2
        base, at = int.from_bytes(data[at + 2 : at + 2 + base_bytes]), at + 2 + base_bytes
        extents, at = int.from_bytes(data[at : at + 2]), at + 2
        places = found.extents.setdefault(item, [])
        found.extent_count += extents
        if found.extent_count > _MAX_EXTENTS:
            raise BadImage(f"the image has more than {_MAX_EXTENTS:,} pieces of items: save it again")
        for _ in range(extents):
            if at >= stop:
                raise damaged("its boxes are cut off")
            at += index_bytes
            offset, at = int.from_bytes(data[at : at + offset_bytes]), at + offset_bytes
            length, at = int.from_bytes(data[at : at + length_bytes]), at + length_bytes
            places.append((base + offset, length or len(data)))


def _pictures(data: bytes, found: _Container) -> Iterator[bytes]:
    """The compressed bytes of each picture: items, and the first frame of each track."""
    total = 0
    for item, places in found.extents.items():
        start = (found.idat or 0) if item in found.in_idat else 0
        total += sum(min(length, len(data)) for _, length in places)
        if total > 2 * len(data):
            raise damaged("its items overlap")
        if found.items.get(item) == b"av01":
            yield b"".join(data[start + at : start + at + length] for at, length in places)
    for at, length in found.frames:
        yield data[at : at + length]
