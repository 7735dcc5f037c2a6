"""Results as a CSV file, which a later run continues."""

import csv
import io
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from stridevit.classify.many import Outcome

if sys.platform != "win32":
    import fcntl

_ANOTHER: Final = "give another file"


class Table:
    """A CSV file with a row for each image, written as soon as it is known. It is locked while it is open."""

    def __init__(self, path: Path, *, model: str | None, top_k: int) -> None:
        """Open the table, or create it. `model`: what the run asks for; None is the service's default.

        A row that a killed run left unfinished is removed. Raises ValueError, and leaves the file as it is, if it holds
        something else or rows of another model, or if another run writes to it; raises OSError.
        """
        ranks = [f"{member}_{rank}" for rank in range(1, top_k + 1) for member in ("label", "probability")]
        self._columns = ["image", *ranks, "requested", "model", "version", "error"]
        self._path, self._requested = path, model or ""
        self.done: set[str] = set()
        """Images that have a row."""
        self.failed: set[str] = set()
        """Those of them whose row is an error."""
        self._file = path.open("a+b", buffering=0)
        try:
            self._lock()
            self._continue()
        except BaseException:
            self._file.close()
            raise

    def add(self, outcome: Outcome) -> None:
        """Write the row of an image, unless another run may give another outcome. Raises OSError."""
        if not outcome.final:
            return
        row: dict[str, str | int] = {"image": outcome.source.name, "requested": self._requested}
        if outcome.problem:
            row["error"] = " ".join(f"{outcome.problem.code}: {outcome.problem.detail}".split())
        elif outcome.answer:
            row |= {"model": outcome.answer.model, "version": outcome.answer.version}
            for rank, best in enumerate(outcome.answer.predictions, 1):
                row |= {f"label_{rank}": best.label, f"probability_{rank}": f"{best.probability:.6f}"}
        self._append(self._line([row.get(column, "") for column in self._columns]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run writes to {self._path}: wait for its end, or {_ANOTHER}") from error
        except OSError:
            return  # a file system without locks

    def _continue(self) -> None:
        """Read what is there; nothing is changed before it is known to be a table of this command."""
        self._file.seek(0)
        data, header = self._file.read(), self._line(self._columns)
        if header.startswith(data) and data != header:  # empty, or killed in the first line
            self._file.truncate(0)
            self._append(header)
            return
        rows, length = _rows(data)
        if not rows or rows[0][0] != "image":
            raise ValueError(f"{self._path} is no table of this command: {_ANOTHER}")
        if rows[0] != self._columns:
            raise ValueError(f"{self._path} has other columns than this run: give the same --top-k, or {_ANOTHER}")
        found = [dict(zip(self._columns, row, strict=False)) for row in rows[1:]]
        if others := {row.get("requested", "") for row in found} - {self._requested}:
            other = min(others)
            fix = f"give --model {other}" if other else "leave out --model"
            what = f"model {other!r}" if other else "the service's default model"
            raise ValueError(f"{self._path} has rows of {what}, which this run does not ask for: {fix}, or {_ANOTHER}")
        self.done = {row["image"] for row in found}
        self.failed = {row["image"] for row in found if row.get("error")}
        if length < len(data):
            self._file.truncate(length)

    def _line(self, cells: list[str] | list[str | int]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue().encode("utf-8")

    def _append(self, line: bytes) -> None:
        """Write a whole line; what a full disk took of it is removed again, so that no row goes on in its middle."""
        length = self._file.seek(0, io.SEEK_END)
        try:
            rest = line
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(length)
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def _rows(data: bytes) -> tuple[list[list[str]], int]:
    """The rows that end with a line end, and how many bytes they take; no rows if it is no CSV in UTF-8."""
    length = data.rfind(b"\n") + 1
    try:
        text = data[:length].decode("utf-8-sig")  # spreadsheets write a byte order mark
        return [row for row in csv.reader(io.StringIO(text, newline="")) if row], length
    except (UnicodeDecodeError, csv.Error):
        return [], length
