"""The orientation from EXIF and XMP metadata, and nothing else from them. Anything odd means upright: 1."""

import re
import struct
from typing import NamedTuple

from service.images.header import Bytes

ORIENTATION = 0x0112
_MAX_ENTRIES = 1_000
"""Entries of a directory that are looked at: cameras write about twenty, sorted, and the orientation comes early."""
_MAX_XMP = 1 << 20
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')

_PREFIXES = {b"II*\0": "<", b"MM\0*": ">", b"MM*\0": ">", b"II\0*": "<", b"II+\0": "<", b"MM\0+": ">"}

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Bytes of a value by its type in TIFF 6.0; 16 is BigTIFF's."""
INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}
"""Unsigned types as letters of `struct`."""


class Layout(NamedTuple):
    """How numbers are stored."""

    endian: str
    big: bool
    """BigTIFF: counts and offsets of eight bytes."""

    @property
    def entry_bytes(self) -> int:
        return 20 if self.big else 12

    @property
    def inline_bytes(self) -> int:
        """Values of at most this many bytes are stored in the entry itself."""
        return 8 if self.big else 4


class Entry(NamedTuple):
    """A tag of a directory."""

    tag: int
    kind: int
    values: int
    """Their number."""
    at: int
    """Offset of the entry itself."""
    values_at: int
    """Offset of its values."""


def layout(data: Bytes) -> Layout | None:
    """That of a TIFF, or of EXIF, which has the same structure. None: it is neither."""
    prefix = bytes(memoryview(data)[:4])
    endian = _PREFIXES.get(prefix)
    return None if endian is None else Layout(endian, b"+" in prefix)


def first_directory(data: Bytes, form: Layout) -> tuple[int, int]:
    """Offset of its first entry, and the number of entries. Raises struct.error."""
    (at,) = struct.unpack_from(form.endian + ("Q" if form.big else "I"), data, 8 if form.big else 4)
    if at > len(memoryview(data)):
        raise struct.error("the directory is outside the file")
    (count,) = struct.unpack_from(form.endian + ("Q" if form.big else "H"), data, at)
    return at + (8 if form.big else 2), count


def entry(data: Bytes, form: Layout, at: int) -> Entry:
    """The entry at an offset. Raises struct.error."""
    endian = form.endian
    tag, kind, count = struct.unpack_from(endian + ("HHQ" if form.big else "HHI"), data, at)
    values_at = at + form.entry_bytes - form.inline_bytes
    if SIZES.get(kind, 0) * count > form.inline_bytes:
        (values_at,) = struct.unpack_from(endian + ("Q" if form.big else "I"), data, values_at)
    return Entry(tag, kind, count, at, values_at)


def number(data: Bytes, form: Layout, found: Entry) -> int | None:
    """The first value of an entry. None: not a whole number. Raises struct.error."""
    letter = INTEGERS.get(found.kind)
    if letter is None or not found.values or found.values_at > len(memoryview(data)):
        return None
    value: int = struct.unpack_from(form.endian + letter, data, found.values_at)[0]
    return value


def from_exif(data: Bytes) -> int | None:
    """The orientation in an EXIF block, with or without its `Exif` prefix. None: it has none."""
    view = memoryview(data)
    while bytes(view[:6]) == b"Exif\0\0":
        view = view[6:]
    form = layout(view)
    if form is None:
        return None
    try:
        at, count = first_directory(view, form)
        tag = struct.Struct(form.endian + "H")
        for place in range(at, at + min(count, _MAX_ENTRIES) * form.entry_bytes, form.entry_bytes):
            if tag.unpack_from(view, place)[0] == ORIENTATION:
                return number(view, form, entry(view, form, place))
    except struct.error:
        # It is cut off.
        return None
    return None


def from_xmp(data: Bytes) -> int | None:
    """The orientation in an XMP packet. None: it has none."""
    match = _XMP_ORIENTATION.search(memoryview(data)[:_MAX_XMP])
    return int(match[1]) if match else None


def orientation(exif: Bytes | None, xmp: Bytes | None) -> int:
    """1 to 8; XMP counts where EXIF says nothing."""
    found = from_exif(exif) if exif is not None else None
    if found is None and xmp is not None:
        found = from_xmp(xmp)
    return found if found is not None and 1 <= found <= 8 else 1
