"""Raw samples, one row per request, as the locustfile writes them; and what a time window of them shows."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

UNSENT = -1
"""Status of an arrival that was not sent because too many requests were in flight; 0 is a request without an answer."""

LATE_MS = 5.0
"""A request sent more than this after it was due is late: the generator, not the server, was slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The outcome of one request."""

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
    correct: bool | None
    """Whether the first class was the right one; None if unknown."""

    @property
    def ok(self) -> bool:
        """Answered with 200."""
        return self.status == 200


COLUMNS = tuple(column.name for column in fields(Sample))


def sample_writer(stream: TextIO) -> Callable[[Sample], None]:
    """Write a header, and return the function that adds a row."""
    table = csv.writer(stream)
    table.writerow(COLUMNS)

    def write(sample: Sample) -> None:
        numbers = (f"{sample.due_s:.6f}", f"{sample.latency_ms:.3f}", sample.status, f"{sample.behind_ms:.3f}")
        correct = "" if sample.correct is None else int(sample.correct)
        table.writerow((*numbers, sample.model, sample.image, correct))

    return write


def read_samples(path: Path) -> list[Sample]:
    """All complete rows of a file: the last may be cut off if the generator was killed."""
    with path.open(encoding="utf-8", newline="") as stream:
        text = stream.read()
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
        for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    ]


@dataclass(frozen=True, kw_only=True)
class Window:
    """What the samples of a time window show."""

    throughput: float
    """Images answered with 200, per second."""
    latencies_ms: npt.NDArray[np.float64] = field(repr=False)
    """Of every request that was due in the window, counted from the moment at which it was due; infinite if it was not
    answered with 200, or not sent."""
    errors: int
    """Requests sent, but not answered with 200."""
    late_arrivals: int = 0
    """Sent more than `LATE_MS` after they were due."""
    unsent_arrivals: int = 0
    labelled: int = 0
    """Answers for images whose class is known."""
    correct: int = 0
    """Those of them whose first class was the right one."""


def window(samples: Sequence[Sample], *, begin: float, seconds: float) -> Window:
    """The `seconds` after `begin`, a Unix time.

    Throughput counts the answers that *ended* in the window; latencies are of the requests that were *due* in it,
    whenever they ended. Requiring both would leave out the slowest, most of all those of a slow server.
    """
    end = begin + seconds
    ended = sum(sample.ok and begin < sample.due_s + sample.latency_ms / 1000 <= end for sample in samples)
    due = [sample for sample in samples if begin <= sample.due_s < end]
    sent = [sample for sample in due if sample.status != UNSENT]
    labelled = [sample.correct for sample in due if sample.correct is not None]
    return Window(
        throughput=ended / seconds,
        latencies_ms=np.array([sample.latency_ms if sample.ok else np.inf for sample in due], dtype=np.float64),
        errors=sum(not sample.ok for sample in sent),
        late_arrivals=sum(sample.behind_ms > LATE_MS for sample in sent),
        unsent_arrivals=len(due) - len(sent),
        labelled=len(labelled),
        correct=sum(labelled),
    )
