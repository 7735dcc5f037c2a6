"""Scan of a JPEG: from marker to marker up to the compressed data, whose scans are counted if there may be several."""

import re
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from service.errors import BadImage
from service.images.exif import orientation
from service.images.header import Bytes, ImageHeader, Scan, check_size, damaged

_MAX_SEGMENTS = 4_096
"""Segments before the picture: 64 KiB each, they could hold 256 MB of metadata. Cameras write up to 40."""
_MAX_TABLES, _MAX_TABLE_BYTES = 256, 32 * 1024
"""Tables and the like that the decoder gets, which Pillow reads in Python; eight of two kinds are of use, 3 kB."""
_MAX_EXIF_PARTS = 16
"""Segments of EXIF that are joined: the orientation is in the first."""

MAX_SCANS = 100
"""Most scans of a picture, each a pass over all pixels. Encoders write about ten; libtiff has the same limit."""
_SCANS_A_PIXEL = 10
"""A further scan costs a tenth of decoding the picture: 0.5 to 1.1 ms of CPU per megapixel against 10."""
_ARITHMETIC = 5
"""Cost of arithmetic coding relative to Huffman coding, for each scan."""

_MARKER = re.compile(rb"\xff([^\0\xff])", re.DOTALL)
_NOT_STUFFING = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])", re.DOTALL)

_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_SEVERAL_SCANS = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
"""Progressive frames."""
_ARITHMETIC_FRAMES = frozenset(range(0xC9, 0xD0))
_TABLES = frozenset({0xC4, 0xCC, 0xDB, 0xDD})
"""Huffman tables, arithmetic conditioning, quantisation, restart interval."""
_ALONE = frozenset({0x01, *range(0xD0, 0xD9), *range(0xF0, 0xFE), 0xC8})
"""Markers without a length, including those that Pillow reads as such."""
_APP0, _APP1, _APP14, _END, _START_OF_SCAN = 0xE0, 0xE1, 0xEE, 0xD9, 0xDA
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


@dataclass(slots=True)
class _Segments:
    """The segments before the compressed data that matter."""

    data: bytes
    tables: list[memoryview] = field(default_factory=list)
    table_bytes: int = 0
    frame: tuple[int, bytes] | None = None
    """Marker and payload of the frame header."""
    jfif: memoryview | None = None
    adobe: memoryview | None = None
    exif: list[memoryview] = field(default_factory=list)
    xmp: memoryview | None = None

    def take(self, code: int, start: int, end: int) -> None:
        """Look at a segment: its marker's code, the start of the marker and the end of the payload."""
        payload = start + 4
        if code in _FRAMES:
            if self.frame is not None:
                raise damaged("it has two frame headers")
            self.frame = code, self.data[payload:end]
        elif code >= _APP0:
            self._take_metadata(code, start, payload, end)
            return
        elif code not in _TABLES:
            return
        self.tables.append(memoryview(self.data)[start:end])
        self.table_bytes += end - start
        if len(self.tables) > _MAX_TABLES or self.table_bytes > _MAX_TABLE_BYTES:
            raise damaged(f"it has more than {_MAX_TABLES} tables, or {_MAX_TABLE_BYTES:,} bytes of them")

    def _take_metadata(self, code: int, start: int, payload: int, end: int) -> None:
        data, view = self.data, memoryview(self.data)
        if code == _APP1:
            if data.startswith(_EXIF, payload) and len(self.exif) < _MAX_EXIF_PARTS:
                self.exif.append(view[payload + len(_EXIF) : end])
            elif data.startswith(_XMP, payload):
                self.xmp = view[payload + len(_XMP) : end]
        elif code == _APP0 and self.jfif is None and data.startswith(b"JFIF", payload):
            self.jfif = view[start:end]
        elif code == _APP14 and data.startswith(b"Adobe", payload):
            self.adobe = view[start:end]


def scan(data: bytes, max_pixels: int) -> Scan:
    """Raises BadImage or TooManyPixels."""
    found = _Segments(data)
    start = _read_segments(data, found)
    if found.frame is None:
        raise damaged("it has no frame header")
    header = _header(data, start + 2, *found.frame, max_pixels=max_pixels)
    exif: Bytes | None = None
    if found.exif:
        exif = found.exif[0] if len(found.exif) == 1 else b"".join(found.exif)
    # The decoder guesses the colours from JFIF and Adobe's segment.
    colours = [segment for segment in (found.jfif, found.adobe) if segment is not None]
    pieces: tuple[Bytes, ...] = b"\xff\xd8", *colours, *found.tables, memoryview(data)[start:]
    return Scan(header, pieces, partial(orientation, exif, found.xmp))


def _read_segments(data: bytes, found: _Segments) -> int:
    """Offset of the first scan."""
    at, size = 2, len(data)
    for _ in range(_MAX_SEGMENTS):
        if data[at] != 0xFF or data[at + 1] in (0, 0xFF):
            # Padding, or bytes that belong to no segment.
            match = _MARKER.search(data, at)
            if match is None:
                raise damaged("it ends before the picture")
            at = match.start(1) - 1
        code = data[at + 1]
        if code in _ALONE:
            at += 2
            continue
        if code == _END:
            raise damaged("it has no picture")
        length = int.from_bytes(data[at + 2 : at + 4])
        if length < 2 or at + 2 + length > size:
            raise damaged("it ends before the picture")
        if code == _START_OF_SCAN:
            return at
        found.take(code, at, at + 2 + length)
        at += 2 + length
    raise BadImage(f"the image has more than {_MAX_SEGMENTS:,} segments before the picture: remove its metadata")


def _header(data: bytes, scan_at: int, code: int, frame: bytes, *, max_pixels: int) -> ImageHeader:
    """`scan_at`: offset of the first scan's length; `frame`: the payload of the frame header."""
    if len(frame) < 6 or len(frame) < 6 + 3 * frame[5]:
        raise damaged("its frame header is cut off")
    height, width, components = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5]), frame[5]
    check_size(width, height, max_pixels)
    pixels = width * height
    arithmetic = _ARITHMETIC if code in _ARITHMETIC_FRAMES else 1
    # Four bytes per decoded pixel, four while it is turned, four more while CMYK becomes RGB.
    decoded = pixels * (12 if components == 4 else 8)
    if code not in _SEVERAL_SCANS and data[scan_at + 2 : scan_at + 3] == bytes([components]):
        return ImageHeader("JPEG", width, height, pixels * arithmetic, decoded)
    scans = count_scans(data, scan_at)
    if scans > MAX_SCANS:
        raise BadImage(f"the image has {scans} scans; the limit is {MAX_SCANS}: save it as a baseline JPEG")
    work = pixels * arithmetic * (_SCANS_A_PIXEL + scans) // _SCANS_A_PIXEL
    return ImageHeader("JPEG", width, height, work, decoded + _coefficient_bytes(width, height, frame))


def count_scans(data: bytes, scan_at: int) -> int:
    """Scans of the picture whose first scan's length is at this offset: an upper bound while it is within the limit."""
    # Compressed data never contains this marker, but segments between scans, or a video after the picture, may.
    scans = 1 + count_scan_markers(data, scan_at)
    if scans <= MAX_SCANS:
        return scans
    at, scans = scan_at + int.from_bytes(data[scan_at : scan_at + 2]), 1
    while match := _NOT_STUFFING.search(data, at):
        code, at = match[1][0], match.end()
        if code == _END:
            break
        if code in _ALONE:
            continue
        scans += code == _START_OF_SCAN
        at += max(2, int.from_bytes(data[at : at + 2]))
    return scans


def count_scan_markers(data: bytes, start: int = 0) -> int:
    """Start-of-scan markers from this offset on, whatever they are part of."""
    # Several times faster than bytes.count.
    view = np.frombuffer(data, np.uint8, offset=start)
    places = np.flatnonzero(view[1:] == _START_OF_SCAN)
    return int(np.count_nonzero(view[places] == 0xFF))


def _coefficient_bytes(width: int, height: int, frame: bytes) -> int:
    """Bytes of all coefficients, which the decoder keeps until the last scan: two for each."""
    factors = [(factor >> 4 or 1, factor & 15 or 1) for factor in frame[7 : 6 + 3 * frame[5] : 3]]
    most_x, most_y = max(x for x, _ in factors), max(y for _, y in factors)
    across, down = -(-width // (8 * most_x)), -(-height // (8 * most_y))
    return across * down * sum(x * y for x, y in factors) * 128
