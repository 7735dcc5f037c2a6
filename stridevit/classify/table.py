"""Results as a CSV file, which a later run continues."""

import csv
import io
from pathlib import Path
from types import TracebackType
from typing import Self

from stridevit.classify.many import Outcome


class Table:
    """A CSV file with a row for each image, written as soon as it is known."""

    def __init__(self, path: Path, *, top_k: int) -> None:
        """Open the file, or create it. Raises ValueError if it holds something else, and OSError."""
        ranks = [f"{member}_{rank}" for rank in range(1, top_k + 1) for member in ("label", "probability")]
        columns = ["image", *ranks, "model", "version", "error"]
        rows = _rows(path)
        if rows and rows[0] != columns:
            raise ValueError(f"{path} has other columns than this run: give the same --top-k, or another file")
        self.done = {row[0] for row in rows[1:]}
        """Images that have a row."""
        self._file = path.open("a", encoding="utf-8", newline="")
        self._rows = csv.DictWriter(self._file, columns, restval="", lineterminator="\n")
        if not rows:
            self._rows.writeheader()

    def add(self, outcome: Outcome) -> None:
        """Write the row of an image, unless another run may give another outcome."""
        if not outcome.final:
            return
        row: dict[str, str | int] = {"image": outcome.source.name}
        if outcome.problem:
            row["error"] = " ".join(f"{outcome.problem.code}: {outcome.problem.detail}".split())
        elif outcome.answer:
            row |= {"model": outcome.answer.model, "version": outcome.answer.version}
            for rank, best in enumerate(outcome.answer.predictions, 1):
                row |= {f"label_{rank}": best.label, f"probability_{rank}": f"{best.probability:.6f}"}
        self._rows.writerow(row)
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def _rows(path: Path) -> list[list[str]]:
    """The rows of a file; one that a killed run left unfinished is removed."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [row for row in csv.reader(io.StringIO(whole.decode("utf-8"), newline="")) if row]
