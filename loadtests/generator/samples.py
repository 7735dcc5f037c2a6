"""Raw samples, one row per request, as the locustfile writes them."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

UNSENT = -1
"""Status of an arrival that was not sent because too many requests were in flight; 0 is a request without an answer."""

LATE_MS = 5.0
"""A request sent more than this after it was due is late: the generator, not the server, was slow."""


class Sample(NamedTuple):
    """The outcome of one request: a row of the file, whose header has these names."""

    due_s: float
    """Unix time at which it was scheduled."""
    latency_ms: float
    """From `due_s` to the end of the answer."""
    status: int
    behind_ms: float
    """Delay between `due_s` and sending."""
    model: str
    """The model that answered, as name/version."""
    image: int
    """Number of the payload."""
    correct: int | None
    """1 if the first class was the right one, 0 if not; None if unknown, which is NaN in an array."""


Samples = np.recarray[Any, Any]
"""An array for each field of `Sample`, in the order of the file."""
_ROW = np.dtype({"names": Sample._fields, "formats": ["f8", "f8", "i8", "f8", "O", "i8", "f8"]})


def as_samples(rows: Iterable[tuple[Any, ...]]) -> Samples:
    """Rows of numbers, or of their texts, as arrays."""
    return np.array(list(rows), dtype=_ROW).view(np.recarray)


def read_samples(path: Path) -> Samples:
    """All complete rows of a file, if there is one: the last may be cut off if the generator was killed."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    header_and_rows = csv.reader(text[: text.rfind("\n") + 1].splitlines())
    return as_samples((*row, correct or None) for *row, correct in list(header_and_rows)[1:])
