"""Small files that are expensive to decode: what one request can make large is in their metadata and headers."""

import io
import struct
import zlib
from collections.abc import Iterable

from PIL import Image

_BYTE, _SHORT, _LONG = 1, 3, 4
"""Field types of TIFF."""
_ODD_TYPE = 99
_LZW = 5
_ORIENTATION = 0x0112
_TALL = 50_000_000
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Entry = tuple[int, int, int, bytes]
"""A TIFF tag: number, type, count, and the four bytes of its value or offset."""


def hostile_images() -> dict[str, bytes]:
    """The files by what is odd in them."""
    return {
        "PNG with 65,000 EXIF tags": png_with_exif(65_000),
        "PNG with 60 MB of compressed text": png_with_text(60),
        f"PNG of 1 × {_TALL:,} pixels": tall_png(_TALL),
        "JPEG with EXIF in 300,000 segments": jpeg_with_exif(300_000, 1),
        "JPEG with 16 MB of EXIF": jpeg_with_exif(256, 65_000),
        "TIFF with a million strips": tiff_with_strips(1_000_000),
        "TIFF with 4,080 odd tags": tiff([*_tiny_picture(), *_one_strip(), *_odd_tags(4080)]),
        "TIFF with a tile of 32,768 × 32,768": tiff([*_tiny_picture(), *_large_tile()]),
    }


def png_with_exif(tags: int) -> bytes:
    """One pixel, and an eXIf chunk with that many tags."""
    # Rotated, so that the orientation is removed from the EXIF and all of it is written anew.
    turned = struct.pack(">HH", 6, 0)
    entries = [(tag, _SHORT, 1, turned if tag == _ORIENTATION else bytes(4)) for tag in range(tags)]
    return png([(b"eXIf", b"".join(_directory(entries, b"MM", offset=8)))])


def png_with_text(megabytes: int) -> bytes:
    """One pixel, and that many compressed texts of a megabyte."""
    text = b"Comment\x00\x00" + zlib.compress(bytes(2**20 - 1), 9)
    return png([(b"zTXt", text)] * megabytes)


def tall_png(height: int) -> bytes:
    """A grey column."""
    packer = zlib.compressobj(9)
    rows = bytes(2 * 1_000_000)
    data = b"".join(packer.compress(rows) for _ in range(height // 1_000_000)) + packer.flush()
    return png([], width=1, height=height, data=data)


def png(chunks: Iterable[tuple[bytes, bytes]], *, width: int = 1, height: int = 1, data: bytes | None = None) -> bytes:
    """A grey PNG with further chunks before its data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(2)) if data is None else data
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return _PNG_SIGNATURE + b"".join(_chunk(kind, body) for kind, body in parts)


def jpeg_with_exif(segments: int, size: int) -> bytes:
    """A small JPEG whose EXIF comes in that many segments."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    start, rest = buffer.getvalue()[:2], buffer.getvalue()[2:]
    payload = b"Exif\x00\x00" + bytes(size)
    return start + (b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload) * segments + rest


def tiff_with_strips(strips: int) -> bytes:
    """A column of pixels with a strip for each."""
    entries: list[Entry] = [
        (256, _SHORT, 1, _short(1)),
        (257, _LONG, 1, struct.pack("<I", strips)),
        (258, _SHORT, 1, _short(8)),
        (259, _SHORT, 1, _short(1)),
        (262, _SHORT, 1, _short(1)),
        (278, _SHORT, 1, _short(1)),
    ]
    table = 8 + 2 + 12 * (len(entries) + 2) + 4
    # Offsets and sizes share one table of bytes.
    shared = struct.pack("<I", table)
    return tiff([*entries, (273, _BYTE, strips, shared), (279, _BYTE, strips, shared)]) + b"\x01" * strips


def tiff(entries: Iterable[Entry]) -> bytes:
    """A TIFF with one directory."""
    return b"".join(_directory(list(entries), b"II", offset=8))


def _tiny_picture() -> list[Entry]:
    """One grey pixel, compressed by LZW, so that libtiff reads it."""
    sizes = [(256, 1), (257, 1), (258, 8), (259, _LZW), (262, 1), (277, 1)]
    return [(tag, _SHORT, 1, _short(value)) for tag, value in sizes]


def _one_strip() -> list[Entry]:
    return [(273, _SHORT, 1, _short(8)), (278, _SHORT, 1, _short(1)), (279, _SHORT, 1, _short(8))]


def _odd_tags(count: int) -> list[Entry]:
    return [(40_000 + number, _ODD_TYPE, 1, bytes(4)) for number in range(count)]


def _large_tile() -> list[Entry]:
    side = struct.pack("<I", 32_768)
    return [(322, _LONG, 1, side), (323, _LONG, 1, side), (324, _LONG, 1, _short(8)), (325, _LONG, 1, _short(8))]


def _short(value: int) -> bytes:
    return struct.pack("<HH", value, 0)


def _directory(entries: list[Entry], order: bytes, *, offset: int) -> list[bytes]:
    """A TIFF's header, and its directory by ascending tags."""
    end = "<" if order == b"II" else ">"
    rows = [struct.pack(f"{end}HHI", tag, kind, count) + value for tag, kind, count, value in sorted(entries)]
    head = order + struct.pack(f"{end}HI", 42, offset)
    return [head, struct.pack(f"{end}H", len(rows)), *rows, bytes(4)]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
