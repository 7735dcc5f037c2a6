"""Raw samples, a row a request, as the locustfile writes them; and what a window of them says."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

COLUMNS = ("due_s", "latency_ms", "status", "behind_ms", "model", "image", "correct")
UNSENT = -1
"""Status of an arrival that was not sent, for too many were under way; 0 is one without an answer."""

LATE_MS = 5.0
"""Sent more than this after its moment, an image is late: the generator, not the server, was slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What became of one request."""

    due_s: float
    """Unix time at which it was to be sent."""
    latency_ms: float
    """From then to the end of its answer."""
    status: int
    behind_ms: float
    """How much later it was sent."""
    model: str
    """That answered, as name/version."""
    image: int
    """Its number in the sequence of payloads."""
    correct: bool | None
    """Whether the first class was the right one; None where that is not known."""

    @property
    def ok(self) -> bool:
        """Answered with 200."""
        return self.status == 200


def writer(stream: TextIO) -> Callable[[Sample], None]:
    """Write a header, and give the function that adds a row."""
    table = csv.writer(stream)
    table.writerow(COLUMNS)

    def write(sample: Sample) -> None:
        right = "" if sample.correct is None else int(sample.correct)
        numbers = (f"{sample.due_s:.6f}", f"{sample.latency_ms:.3f}", sample.status, f"{sample.behind_ms:.3f}")
        table.writerow((*numbers, sample.model, sample.image, right))

    return write


def read_samples(path: Path) -> list[Sample]:
    """All whole rows of a file: the last may be cut off where a generator was ended."""
    with path.open(encoding="utf-8", newline="") as stream:
        text = stream.read()
    whole = text[: text.rfind("\n") + 1]
    return [
        Sample(
            due_s=float(row["due_s"]),
            latency_ms=float(row["latency_ms"]),
            status=int(row["status"]),
            behind_ms=float(row["behind_ms"]),
            model=row["model"],
            image=int(row["image"]),
            correct=None if row["correct"] == "" else row["correct"] == "1",
        )
        for row in csv.DictReader(io.StringIO(whole))
    ]


@dataclass(frozen=True, kw_only=True)
class Window:
    """What the samples say of a window in time."""

    begin: float
    """Unix time."""
    throughput: float
    latencies_ms: npt.NDArray[np.float64]
    """Of all requests that were due in the window; infinite where they were not answered with 200."""
    errors: int
    late_arrivals: int
    """Sent more than `LATE_MS` after their moment."""
    unsent_arrivals: int
    labelled: int
    correct: int


def window(samples: list[Sample], *, warmup_seconds: float, seconds: float) -> Window:
    """The `seconds` that follow the warm-up, which begins with the first request.

    Throughput counts the answers that *ended* in the window; latencies are of the requests that were *due* in it,
    whenever they ended. To ask for both would leave out the slowest, and those of a slow server most.
    """
    begin = min(sample.due_s for sample in samples) + warmup_seconds
    end = begin + seconds
    ended = sum(sample.ok and begin < sample.due_s + sample.latency_ms / 1000 <= end for sample in samples)
    due = [sample for sample in samples if begin <= sample.due_s < end]
    known = [sample.correct for sample in due if sample.correct is not None]
    return Window(
        begin=begin,
        throughput=ended / seconds,
        latencies_ms=np.array([sample.latency_ms if sample.ok else np.inf for sample in due], dtype=np.float64),
        errors=sum(not sample.ok and sample.status != UNSENT for sample in due),
        late_arrivals=sum(sample.behind_ms > LATE_MS and sample.status != UNSENT for sample in due),
        unsent_arrivals=sum(sample.status == UNSENT for sample in due),
        labelled=len(known),
        correct=sum(known),
    )
