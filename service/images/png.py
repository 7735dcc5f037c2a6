"""Scan of a PNG: from chunk to chunk. The decoder gets those that define the pixels, the picture as a single one."""

import struct
import zlib
from dataclasses import dataclass, field
from functools import partial

from service.errors import BadImage
from service.images.exif import orientation
from service.images.header import MAX_PARTS, Bytes, ImageHeader, Scan, check_size, damaged

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"\0\0\0\0IEND\xaeB`\x82"
_CHUNK = struct.Struct(">I4s")
_XMP, _EXIF = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"
"""Keywords of texts that may hold an orientation."""
_MAX_TEXT = 1 << 20
"""Most bytes of a text that are unpacked to find the orientation."""
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_LARGEST = {b"IHDR": 64, b"PLTE": 3 * 256, b"tRNS": 256}
"""Most bytes of the chunks that are kept: at least what the specification allows."""

_WORK = 2
"""Cost of a pixel, in pixels of a JPEG, unless it has alpha: measured 1.5 to 2."""
_WORK_ALPHA = 6


@dataclass(slots=True)
class _Chunks:
    """The chunks that matter."""

    kept: dict[bytes, memoryview] = field(default_factory=dict)
    """Those that are decoded, whole."""
    picture: list[memoryview] = field(default_factory=list)
    """The contents of the first IDAT chunks in a row: the decoder reads no others."""
    picture_ended: bool = False
    exif: memoryview | None = None
    texts: dict[bytes, tuple[bytes, memoryview]] = field(default_factory=dict)
    """Kind and content of the texts that may hold an orientation."""

    def take(self, kind: bytes, chunk: memoryview) -> None:
        """Look at a chunk, whole."""
        content = chunk[8:-4]
        if kind == b"IDAT":
            if not self.picture_ended:
                self.picture.append(content)
            return
        self.picture_ended = bool(self.picture)
        if kind == b"eXIf":
            self.exif = content
        elif kind in _TEXTS:
            for keyword in (_XMP, _EXIF):
                if bytes(content[: len(keyword)]) == keyword:
                    self.texts[keyword] = kind, content[len(keyword) :]
        elif kind in _LARGEST and not self.picture:
            if len(content) > _LARGEST[kind]:
                raise damaged(f"a {kind.decode()} chunk of {len(content):,} bytes")
            self.kept[kind] = chunk


def scan(data: bytes, max_pixels: int) -> Scan:
    """Raises BadImage or TooManyPixels."""
    found = _Chunks()
    _read_chunks(data, found)
    if b"IHDR" not in found.kept or not found.picture:
        raise damaged("it ends before the picture")
    header = _header(bytes(found.kept[b"IHDR"]), b"tRNS" in found.kept, max_pixels)
    length = sum(len(part) for part in found.picture)
    chunks = [found.kept[kind] for kind in _LARGEST if kind in found.kept]
    # Pillow does not look at the checksum of the picture's chunks.
    pieces: tuple[Bytes, ...] = _SIGNATURE, *chunks, _CHUNK.pack(length, b"IDAT"), *found.picture, b"\0\0\0\0", _END
    return Scan(header, pieces, partial(_orientation, found.exif, found.texts))


def _read_chunks(data: bytes, found: _Chunks) -> None:
    view, at, size = memoryview(data), 8, len(data)
    for _ in range(MAX_PARTS):
        if at + 8 > size:
            return
        length, kind = _CHUNK.unpack_from(data, at)
        end = at + 12 + length
        if kind == b"IEND" or (end > size and kind != b"IDAT"):
            return
        found.take(kind, view[at:end])
        at = end
    if not found.picture_ended:
        raise BadImage(
            f"the image has more than {MAX_PARTS:,} chunks: remove its metadata, and save it with larger ones"
        )


def _header(chunk: bytes, transparent: bool, max_pixels: int) -> ImageHeader:
    if len(chunk) < 12 + 13:
        raise damaged("its header is cut off")
    width, height, colour = struct.unpack_from(">IIxB", chunk, 8)
    check_size(width, height, max_pixels)
    alpha = transparent or colour in (4, 6)
    # Pillow takes four bytes per pixel, and copies the picture to turn it, to convert it, and to weight it by alpha.
    copies, work = (4, _WORK_ALPHA) if alpha else (3, _WORK)
    pixels = width * height
    return ImageHeader("PNG", width, height, work * pixels, 4 * copies * pixels)


def _orientation(exif: Bytes | None, texts: dict[bytes, tuple[bytes, memoryview]]) -> int:
    if exif is None and _EXIF in texts:
        exif = _from_hexadecimal(_unpack(*texts[_EXIF]))
    return orientation(exif, _unpack(*texts[_XMP]) if _XMP in texts else None)


def _unpack(kind: bytes, content: memoryview) -> bytes:
    """At most _MAX_TEXT of the text; empty if it is damaged."""
    if kind == b"iTXt":
        compressed = bytes(content[:1]) == b"\1"
        # The language and the translated keyword end with a zero each.
        parts = bytes(content[2 : _MAX_TEXT + 2]).split(b"\0", 2)
        packed: bytes | memoryview = parts[-1] if len(parts) == 3 else b""
    else:
        compressed, packed = kind == b"zTXt", content[1:] if kind == b"zTXt" else content
    if not compressed:
        return bytes(packed[:_MAX_TEXT])
    try:
        return zlib.decompressobj().decompress(packed, _MAX_TEXT)
    except zlib.error:
        return b""


def _from_hexadecimal(profile: bytes) -> bytes | None:
    """ImageMagick's form of EXIF: three lines of header, then hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(profile.split(b"\n", 3)[3:]).decode("ascii"))
    except ValueError:
        return None
