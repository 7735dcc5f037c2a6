"""Pixels in JSON: whole numbers from 0 to 255 in row-major order, flat or regularly nested."""

import math
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from service.errors import BadRequest

_LEVELS = msgspec.json.Decoder(
    list[Annotated[int, msgspec.Meta(ge=0, le=255)] | Annotated[float, msgspec.Meta(ge=0, le=255, multiple_of=1)]]
)
_CHUNK_BYTES = 256 * 1024
"""Bytes decoded at once, which takes some milliseconds: meanwhile no other thread of the process runs."""
_MAX_DEPTH = 8
_ALL_BUT_STRUCTURE = bytes(set(range(256)) - set(b"[],"))


def read_pixels(array: bytes, shape: tuple[int, ...], place: str) -> npt.NDArray[np.uint8]:
    """The numbers of a JSON text, valid as such, as a tensor: uint8 `shape`. Whole floats such as 1.0 are accepted.

    Raises BadRequest that begins with `place` for a wrong count, ragged lists, and anything but whole numbers in range.

    msgspec makes a list of shared integers of it. simdjson would be two to three times as fast, but had no release for
    over a year, lacks wheels for Python 3.14, and holds the interpreter's lock for as long as a whole body takes.
    """
    expected = f"{place}: must be {math.prod(shape)} whole numbers from 0 to 255, flat or nested in row-major order"
    if not array.startswith(b"["):
        raise BadRequest(expected)
    nested = array.find(b"[", 1) > 0
    numbers = array.translate(None, b"[]") if nested else array[1:-1]
    count = numbers.count(b",") + 1 if numbers.strip() else 0
    if count != math.prod(shape):
        raise BadRequest(f"{expected}, got {count}")
    if nested and not _is_regular(array):
        raise BadRequest(f"{expected}; the lists of one level must be equally long")
    pixels = bytearray()
    start = 0
    while start < len(numbers):
        # Chunks end at a comma, so that no number is split.
        end = numbers.find(b",", start + _CHUNK_BYTES)
        chunk = numbers[start : end if end > 0 else None]
        try:
            levels = _LEVELS.decode(b"[" + chunk + b"]")
        except msgspec.DecodeError as error:
            message, _, index = str(error).partition(" - at `$[")
            where = f"number {len(pixels) + int(index.rstrip(']`'))}: " if index else ""
            raise BadRequest(f"{expected}; {where}{message}") from error
        try:
            pixels += bytes(levels)  # type: ignore[arg-type]
        except TypeError:  # there are floats among them
            pixels += np.array(levels, dtype=np.uint8).tobytes()
        start += len(chunk) + 1
    return np.frombuffer(pixels, dtype=np.uint8).reshape(shape)


def _is_regular(array: bytes) -> bool:
    """Whether the brackets and commas are those of an array whose lists of each level are equally long."""
    structure = array.translate(None, _ALL_BUT_STRUCTURE)
    depth = len(structure) - len(structure.lstrip(b"["))
    if depth > _MAX_DEPTH:
        return False
    expected = b""
    for level in range(1, depth + 1):
        # The first list of this level ends at the first place where that many brackets close.
        size = structure.find(b"]" * level) + level - (depth - level)
        length = (size - 1) // (len(expected) + 1)
        expected = b"[" + (expected + b",") * (length - 1) + expected + b"]"
    return structure == expected
