"""Small files that made a decoder, or what reads metadata, work for seconds or take gigabytes."""

import struct
import zlib
from collections.abc import Sequence

from tests.service.conftest import encoded, noise

PICTURE = noise(64, 48)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(*chunks: bytes) -> bytes:
    """A PNG with further chunks behind its header."""
    whole = encoded(PICTURE)
    return whole[:33] + b"".join(chunks) + whole[33:]


def png_of_size(width: int, height: int) -> bytes:
    """One bit for a pixel, all black."""
    rows = zlib.compress(bytes(height * (1 + -(-width // 8))), 1)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def exif(tags: int, orientation: int = 1) -> bytes:
    """EXIF of an orientation and so many further tags."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    entries += b"".join(struct.pack("<HHII", 0x8000 + tag % 0x7000, 4, 1, tag) for tag in range(tags))
    return b"II*\0" + struct.pack("<IH", 8, 1 + tags) + entries + bytes(4)


def jpeg_segment(code: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, 2 + len(content)) + content


def jpeg_with(segments: bytes, **options: object) -> bytes:
    """A JPEG with further segments behind its start."""
    whole = encoded(PICTURE, "JPEG", **options)
    return whole[:2] + segments + whole[2:]


def jpeg_of_scans(count: int, width: int = 64, height: int = 48) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    whole = encoded(noise(width, height), "JPEG", progressive=True)
    last = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:-2] + last * (count - whole.count(b"\xff\xda")) + whole[-2:]


_LETTERS = {1: "B", 3: "H", 4: "I", 7: "B"}


def tiff(tags: dict[int, tuple[int, Sequence[int]]], data: bytes = b"", *, odd_tags: int = 0) -> bytes:
    """A TIFF of one directory: tag -> (type, values). `data` starts at offset 8; odd tags are of an unknown type."""
    entries, values = b"", b""
    count = len(tags) + odd_tags
    values_at = 8 + len(data) + 2 + 12 * count + 4
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}{_LETTERS[kind]}", *numbers)
        entries += struct.pack("<HHI", tag, kind, len(numbers))
        if len(packed) <= 4:
            entries += packed.ljust(4, b"\0")
        else:
            entries += struct.pack("<I", values_at + len(values))
            values += packed
    entries += b"".join(struct.pack("<HHII", 40_000 + tag, 200, 1, 0) for tag in range(odd_tags))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", count) + entries + bytes(4) + values


def grey_tiff(width: int, height: int, **others: tuple[int, Sequence[int]]) -> dict[int, tuple[int, Sequence[int]]]:
    """Tags of an 8-bit grey picture in one strip at offset 8, without compression. Others by name `t` and number."""
    tags: dict[int, tuple[int, Sequence[int]]] = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]),
        273: (4, [8]), 277: (3, [1]), 278: (4, [height]), 279: (4, [width * height]),
    }  # fmt: skip
    return tags | {int(name[1:]): value for name, value in others.items()}


def tiff_of_tile(side: int) -> bytes:
    """A picture of 16 × 16 in a single tile of `side` × `side`."""
    tags = grey_tiff(16, 16, t259=(3, [8]), t322=(4, [side]), t323=(4, [side]), t324=(4, [8]), t325=(4, [500]))
    del tags[273], tags[278], tags[279]
    return tiff(tags, zlib.compress(bytes(min(side * side, 400_000))).ljust(500, b"\0"))


def gif_with_comments(blocks: int, comments: int = 1) -> bytes:
    """A GIF with comments of blocks of a byte each."""
    whole = encoded(PICTURE.quantize(16), "GIF")
    at = 13 + 3 * (2 << (whole[10] & 7))
    return whole[:at] + (b"!\xfe" + b"\x01a" * blocks + b"\0") * comments + whole[at:]


def bmp_of_runs(side: int, runs: int) -> bytes:
    """A BMP of runs of a single pixel, which is unpacked run by run."""
    palette = b"".join(bytes([index, 0, index, 0]) for index in range(256))
    body = b"\x01\x07" * runs
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 256, 256)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + header + palette + body


def avif_that_claims(width: int, height: int, claimed: int) -> bytes:
    """An AVIF of width × height whose boxes say that it is `claimed` × `claimed`."""
    whole = encoded(noise(width, height), "AVIF")
    return whole.replace(struct.pack(">II", width, height), struct.pack(">II", claimed, claimed))


def av1_units(*units: tuple[int, bytes]) -> bytes:
    """An AV1 bitstream of units: type and content."""
    return b"".join(bytes([kind << 3 | 2, len(content)]) + content for kind, content in units)


def avif_of_extents(items: int, extents: int) -> bytes:
    """An AVIF whose table of items claims extents of no bytes."""
    table = struct.pack(">IBBH", 0, 0, 0, items) + struct.pack(">HHH", 1, 0, extents) * items
    location = struct.pack(">I4s", 8 + len(table), b"iloc") + table
    meta = struct.pack(">I4sI", 12 + len(location), b"meta", 0) + location
    return struct.pack(">I4s4sI", 16, b"ftyp", b"avif", 0) + meta
