"""One large array of small whole numbers, read straight out of JSON text: pixels without a Python object for each.

A general parser makes 3 million objects of 13 MB of nested pixels: 1.8 s in which no other thread of the process runs,
and memory for all of them. This takes a fifth of that time, most of it outside the interpreter's lock.
"""

import re

import numpy as np
import numpy.typing as npt

_KEY = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_ARRAY = re.compile(rb"[0-9\[\], \t\r\n]*")
_SPLIT_NUMBER = re.compile(rb"[0-9][ \t\r\n]+[0-9]")
_SPACES = b" \t\r\n"
_CHUNK_BYTES = 1 << 20
_MAX_DEPTH = 8

Bytes = npt.NDArray[np.uint8]


def lift_data(text: bytes) -> tuple[bytes, Bytes | None]:
    """Take the array of the only member `"data": [...]` out of JSON text: the text with `[null]` in its place, and
    the numbers in row-major order.

    Only a flat or regularly nested array of whole numbers from 0 to 255 is lifted; else the text comes back as it was,
    with None. No string can be mistaken for the member, since quotes inside of strings are escaped, so whatever parser
    reads the rest sees any other fault of the text.
    """
    key = _KEY.search(text)
    if key is None or _KEY.search(text, key.end()):
        return text, None
    start = key.end()
    match = _ARRAY.match(text, start)
    array = match.group().rstrip(b"," + _SPACES) if match else b""
    numbers = None if _splits_a_number(array) else _numbers(array.translate(None, _SPACES))
    if numbers is None:
        return text, None
    return text[:start] + b"[null]" + text[start + len(array) :], numbers


def _splits_a_number(array: bytes) -> bool:
    text = np.frombuffer(array, dtype=np.uint8)
    # The search takes longer than all the rest, so it is made only where a space follows a digit at all.
    spaced = (text[1:] <= ord(" ")) & (text[:-1] - ord("0") < 10)
    return bool(spaced.any()) and _SPLIT_NUMBER.search(array) is not None


def _numbers(array: bytes) -> Bytes | None:
    """The numbers of an array without spaces; None if it is not what `lift_data` takes."""
    size = array.count(b",") + 1
    values, opened, closed = (np.zeros(size, dtype=np.uint8) for _ in range(3))
    done = start = 0
    while start < len(array):
        # Chunks end after a comma, so that no number is cut, and the memory needed is that of one chunk.
        end = (array.find(b",", start + _CHUNK_BYTES) + 1) or len(array)
        chunk = _chunk(np.frombuffer(array, dtype=np.uint8, count=end - start, offset=start))
        if chunk is None:
            return None
        place = slice(done, done + len(chunk[0]))
        values[place], opened[place], closed[place] = chunk
        done, start = place.stop, end
    return values if done == size and _regular(opened, closed) else None


def _chunk(text: Bytes) -> tuple[Bytes, Bytes | int, Bytes | int] | None:
    """Values, and the brackets opened before and closed after each. None if the text is anything else."""
    # Whole-array steps over every byte, since they cost a tenth of those that pick out some.
    digit, opening, closing = text - ord("0") < 10, text == ord("["), text == ord("]")
    ended = digit | closing
    after, before = slice(1, None), slice(None, -1)
    wrong = ~ended[before] & ~(digit | opening)[after]
    wrong |= ended[before] & opening[after]
    wrong |= closing[before] & digit[after]
    wrong |= np.append(True, ~digit[:-2]) & (text[before] == ord("0")) & digit[after]
    if wrong.any() or not (digit[0] or opening[0]) or (digit[:-3] & digit[1:-2] & digit[2:-1] & digit[3:]).any():
        return None
    ones = ((text - ord("0")) * digit).astype(np.uint16)
    numbers = ones.copy()
    numbers[1:] += ones[:-1] * np.uint16(10) * digit[1:]
    numbers[2:] += ones[:-2] * np.uint16(100) * (digit[1:-1] & digit[2:])
    last = np.flatnonzero(digit & ~np.append(digit[1:], False))
    values = numbers.take(last)
    if not len(values) or values.max() > 255:
        return None
    if not (opening.any() or closing.any()):
        return values.astype(np.uint8), 0, 0
    open_count, close_count = (np.cumsum(bracket, dtype=np.int32) for bracket in (opening, closing))
    opened = np.diff(open_count.take(last), prepend=0)
    closed = np.diff(close_count.take(last), append=close_count[-1])
    if max(opened.max(), closed.max()) > _MAX_DEPTH:
        return None
    return values.astype(np.uint8), opened.astype(np.uint8), closed.astype(np.uint8)


def _regular(opened: Bytes, closed: Bytes) -> bool:
    """Whether the brackets around the values are those of one array whose lists of each level are equally long."""
    depth = int(closed[-1])
    if depth < 1 or opened[0] != depth or (opened[1:] != closed[:-1]).any():
        return False
    stride = 0
    for level in range(1, depth + 1):
        ends = closed >= level
        stride = int(ends.argmax()) + 1
        if len(ends) % stride or ends.sum() != len(ends) // stride or not ends[stride - 1 :: stride].all():
            return False
    return stride == len(closed)
