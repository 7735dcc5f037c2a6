"""Images on disk and their labels: image files, class folders or parquet files.

The layouts and columns of training/readers.py, as far as a client can send them, read without importing it. Number and
labels are known before the first image is read, and images are read one at a time: a validation split of several
gigabytes need not fit into memory.
"""

import csv
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from loadtests.errors import LoadTestError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
LABELS_FILE = "labels.csv"
_CSV_LABELS = ("index", "label", "imagenet1k_index")
"""Columns in order of preference; `stridevit images` writes an index and a name."""
_PARQUET_IMAGES = ("img", "image")
_PARQUET_LABELS = ("fine_label", "label")
_SPLITS = ("test-*.parquet", "validation-*.parquet", "val-*.parquet", "*.parquet")
_BATCH_ROWS = 256

Label = int | str | None
"""A class by index or by name; None if unknown."""


class PayloadError(LoadTestError):
    """The images cannot be read; the message says what was expected where."""


@dataclass(frozen=True, slots=True)
class Payload:
    """One image as it is sent."""

    name: str
    """File name, or file name and row."""
    data: bytes = field(repr=False)
    label: Label = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images that can be read one at a time."""

    description: str
    """What they are, as text to follow their number: `files of photos/`."""
    labels: Sequence[Label] = field(repr=False)
    """One per image."""
    read: Callable[[Sequence[int]], Iterator[Payload]] = field(repr=False)
    """The images at these positions, which must ascend. Raises PayloadError."""


def open_source(folder: Path) -> Source:
    """What `folder` holds, in this order of preference. Raises PayloadError.

    - Image files, labelled by its `labels.csv` if there is one (columns `file`, and `index`, `label` (an index or a
      class's name) or `imagenet1k_index`; empty if unknown).
    - Parquet files with a column `img` or `image` of encoded bytes, and `fine_label` or `label` (all files of the test
      split if there is one).
    - One folder per class, by the class's name or index.
    """
    if not folder.is_dir():
        raise PayloadError(f"{folder} is not a folder: --data names a folder of image files or parquet files")
    if files := _images_in(folder):
        table = folder / LABELS_FILE
        labels = _read_labels(table, files) if table.is_file() else [None] * len(files)
        return _file_source(folder, files, labels, f"files of {folder.resolve().name}/")
    for pattern in _SPLITS:
        if tables := sorted(folder.glob(pattern)):
            return _parquet_source(tables)
    classes = [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    if files := [file for child in classes for file in _images_in(child)]:
        names = [file.parent.name for file in files]
        description = f"files of {len(set(names))} classes in {folder.resolve().name}/"
        return _file_source(folder, files, _parse_labels(names), description)
    inside = next((child for child in classes if child.name in ("test", "val", "validation", "data")), None)
    hint = f"; did you mean {inside}?" if inside else ""
    raise PayloadError(
        f"{folder} holds neither image files ({', '.join(IMAGE_SUFFIXES)}) nor parquet files, "
        f"nor class folders of image files{hint}"
    )


def state(folder: Path) -> str:
    """A digest of names, sizes and modification times of a folder's files: the same while they are unchanged."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        about = file.stat()
        digest.update(f"{file.relative_to(folder)}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return digest.hexdigest()


@contextmanager
def _reading(what: Path | str) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.strerror:
            raise PayloadError(f"{what} cannot be read: {error.strerror}") from error
        raise PayloadError(f"{what} cannot be read, it may be damaged: {error}") from error


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not file.name.startswith(".")
    )


def _file_source(root: Path, files: Sequence[Path], labels: Sequence[Label], description: str) -> Source:
    def read(positions: Sequence[int]) -> Iterator[Payload]:
        for position in positions:
            file = files[position]
            with _reading(file):
                data = file.read_bytes()
            yield Payload(file.relative_to(root).as_posix(), data, labels[position])

    return Source(description=description, labels=labels, read=read)


def _read_labels(table: Path, files: Sequence[Path]) -> list[Label]:
    """Labels of `files`; None where the table has no row or an empty one."""
    with _reading(table), table.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        rows, columns = list(reader), reader.fieldnames or ()
    column = next((name for name in _CSV_LABELS if name in columns), None)
    if column is None or "file" not in columns:
        raise PayloadError(
            f"{table} needs a column file, and a column index, label (an index or a class's name) or "
            f"imagenet1k_index: it has {', '.join(columns) or 'none'}"
        )
    given = {row["file"]: (row[column] or "").strip() for row in rows}
    if missing := sorted(set(given) - {file.name for file in files}, key=str):
        raise PayloadError(f"{table} names {len(missing)} files that are not in its folder, {missing[0]!r} among them")
    return _parse_labels([given.get(file.name, "") for file in files])


def _parse_labels(names: Sequence[str]) -> list[Label]:
    """Indices if all labels are numbers, else names: one class among others may be called `2009`."""
    numbers = all(name.isascii() and name.isdigit() for name in names if name)
    return [None if not name else int(name) if numbers else name for name in names]


def _parquet_source(files: Sequence[Path]) -> Source:
    shards: list[tuple[Path, Any]] = []
    rows: list[str] = []
    for file in files:
        with _reading(file):
            (shard,) = ds.dataset(str(file), format="parquet").get_fragments()
            rows += [f"{file.name}#{row}" for row in range(shard.count_rows())]
        shards.append((file, shard))
    first, known = files[0].name, shards[0][1].physical_schema.names
    image, label = (
        next((name for name in names if name in known), None) for names in (_PARQUET_IMAGES, _PARQUET_LABELS)
    )
    if image is None:
        raise PayloadError(f"{files[0]} has no column img or image: it has {', '.join(known)}")
    for file, shard in shards:
        if missing := {image, label} - {None, *shard.physical_schema.names}:
            raise PayloadError(f"{file} has no column {', '.join(sorted(map(str, missing)))}, as {first} has")
    values = [cell.as_py() for cell in _cells(shards, label)] if label else [None] * len(rows)
    # Hugging Face writes -1 where the labels of a test split are withheld.
    labels = [value if isinstance(value, str) or (isinstance(value, int) and value >= 0) else None for value in values]

    def read(positions: Sequence[int]) -> Iterator[Payload]:
        wanted, end = set(positions), max(positions, default=-1) + 1
        for position, cell in itertools.islice(enumerate(_cells(shards, image)), end):
            if position in wanted:
                if not isinstance(data := cell.as_py(), bytes):
                    raise PayloadError(f"{rows[position]}: column {image} holds no bytes there ({cell.type})")
                yield Payload(rows[position], data, labels[position])

    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return Source(description=f"rows of {first}{more}", labels=labels, read=read)


def _cells(shards: Sequence[tuple[Path, Any]], column: str) -> Iterator[Any]:
    """The cells of a column in all files; of encoded images, their bytes."""
    for file, shard in shards:
        is_struct = pa.types.is_struct(shard.physical_schema.field(column).type)
        bare = ds.field(column, "bytes") if is_struct else ds.field(column)
        with _reading(f"{file}: column {column}"):
            for batch in shard.to_batches(columns={column: bare}, batch_size=_BATCH_ROWS, batch_readahead=1):
                yield from batch.column(0)
