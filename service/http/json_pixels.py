"""Pixels in JSON: whole numbers from 0 to 255 in row-major order, flat or regularly nested."""

import itertools
import math
import re
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
_DATA = re.compile(rb'"data"\s*:\s*(?=\[)')
_NO_NUMBERS = re.compile(rb"[^0-9.,eE+\-\[\]\s]")
_MISPLACED_BRACKET = re.compile(rb"\]\s*[^\s,\]]|[^\s,\[]\s*\[")
PLACEHOLDER = b"7.01701411834604692e-77"
"""Stands for the pixels in the text that remains without them."""
_ALL_BUT_STRUCTURE = bytes(set(range(256)) - set(b"[],"))


def without_pixels(text: bytes) -> tuple[bytes, bytes | None]:
    """A JSON text with PLACEHOLDER in place of its one `"data": [...]` of numbers, and those; else the text and None.

    Parsing cannot be split, and all other threads wait for it: the numbers are left to `read_pixels`.
    """
    found = list(itertools.islice(_DATA.finditer(text), 2))
    if len(found) != 1 or PLACEHOLDER in text:
        return text, None
    start = end = found[0].end()
    while end < len(text):
        beyond = _NO_NUMBERS.search(text, end, end + _CHUNK_BYTES)
        end = beyond.start() if beyond else min(len(text), end + _CHUNK_BYTES)
        if beyond:
            break
    array = text[start:end].rstrip()
    if array.endswith(b","):
        array = array[:-1].rstrip()
    if not array.endswith(b"]"):
        return text, None
    return text[:start] + PLACEHOLDER + text[start + len(array) :], array


def count_up_to(text: bytes, marks: bytes, limit: int) -> int:
    """How often a text holds any of the bytes `marks`; stops counting once there are more than `limit`."""
    count = 0
    for start in range(0, len(text), _CHUNK_BYTES):
        count += sum(text.count(mark, start, start + _CHUNK_BYTES) for mark in marks)
        if count > limit:
            break
    return count


def read_pixels(array: bytes, shape: tuple[int, ...], place: str) -> npt.NDArray[np.uint8]:
    """The numbers of a JSON text as a tensor: uint8 `shape`. Whole floats such as 1.0 are accepted.

    Raises BadRequest that begins with `place` for a wrong count, ragged lists, anything but whole numbers in range, and
    what is not JSON.

    msgspec makes a list of shared integers of them. simdjson would be two to three times as fast, but had no release
    for over a year, lacks wheels for Python 3.14, and holds the interpreter's lock for as long as a whole body takes.
    """
    wanted = math.prod(shape)
    expected = f"{place}: must be {wanted} whole numbers from 0 to 255, flat or nested in row-major order"
    if not (array.startswith(b"[") and array.endswith(b"]")):
        raise BadRequest(expected)
    commas = count_up_to(array, b",", wanted)
    count = commas + 1 if commas or array.strip(b"[] \t\r\n") else 0
    if count != wanted:
        exact = count <= wanted or len(array) <= _CHUNK_BYTES
        raise BadRequest(f"{expected}, got {count if exact else 'more'}")
    if not _is_regular(array):
        raise BadRequest(f"{expected}; the lists of one level must be equally long")
    pixels = bytearray()
    start = 0
    while start < len(array):
        # Chunks end at a comma, so that no number is split.
        end = array.find(b",", start + _CHUNK_BYTES)
        chunk = array[start : end if end > 0 else None]
        numbers = chunk.translate(None, b"[]")
        if _MISPLACED_BRACKET.search(chunk):
            raise BadRequest(f"{expected}; a bracket stands beside a number")
        try:
            levels = _LEVELS.decode(b"[" + numbers + b"]")
        except msgspec.DecodeError as error:
            message, _, index = str(error).partition(" - at `$[")
            where = f"number {len(pixels) + int(index.rstrip(']`'))}: " if index else ""
            raise BadRequest(f"{expected}; {where}{message}") from error
        try:
            pixels += bytes(levels)  # type: ignore[arg-type]
        except TypeError:  # there are floats among them
            pixels += np.array(levels, dtype=np.uint8).tobytes()
        start += len(chunk) + 1
    if len(pixels) != wanted:
        raise BadRequest(expected)
    return np.frombuffer(pixels, dtype=np.uint8).reshape(shape)


def _is_regular(array: bytes) -> bool:
    """Whether the brackets and commas are those of an array whose lists of each level are equally long."""
    structure = b"".join(
        array[start : start + _CHUNK_BYTES].translate(None, _ALL_BUT_STRUCTURE)
        for start in range(0, len(array), _CHUNK_BYTES)
    )
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
