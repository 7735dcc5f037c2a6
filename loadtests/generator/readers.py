"""Images on disk and their labels: image files, class folders or parquet files.

The layouts and columns of training/readers.py, as far as a client can send them, read without importing it. Number and
labels are known before the first image is read, and images are read one at a time: a validation split of several
gigabytes need not fit into memory.
"""

import csv
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
    """What they are, to follow their number: `files of photos/`."""
    labels: Sequence[Label] = field(repr=False)
    """One per image."""
    read_files: Callable[[Sequence[int]], Iterator[tuple[str, bytes]]] = field(repr=False)
    """Name and bytes of the images at ascending positions."""

    def read(self, positions: Sequence[int]) -> Iterator[Payload]:
        """The images at these positions, which must ascend. Raises PayloadError."""
        for position, (name, data) in zip(positions, self.read_files(positions), strict=True):
            yield Payload(name, data, self.labels[position])


def open_source(folder: Path) -> Source:
    """What `folder` holds: image files, parquet files or class folders, in this order of preference.

    Raises PayloadError.
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


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not file.name.startswith(".")
    )


def _file_source(root: Path, files: Sequence[Path], labels: Sequence[Label], description: str) -> Source:
    def read(positions: Iterable[int]) -> Iterator[tuple[str, bytes]]:
        for file in map(files.__getitem__, positions):
            try:
                yield file.relative_to(root).as_posix(), file.read_bytes()
            except OSError as error:
                raise PayloadError(f"{file} cannot be read: {error.strerror or error}") from error

    return Source(description=description, labels=labels, read_files=read)


def _read_labels(table: Path, files: Sequence[Path]) -> list[Label]:
    """Labels of `files`; None where the table has no row or an empty one."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows, columns = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PayloadError(f"{table} cannot be read: {error}") from error
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
    names = _open(files[0]).schema_arrow.names
    image, label = (
        next((name for name in known if name in names), None) for known in (_PARQUET_IMAGES, _PARQUET_LABELS)
    )
    if image is None:
        raise PayloadError(f"{files[0]} has no column img or image: it has {', '.join(names)}")
    labels: list[Label] = []
    for file in files:
        opened = _open(file)
        if missing := {image, label} - {None, *opened.schema_arrow.names}:
            raise PayloadError(f"{file} has no column {', '.join(sorted(map(str, missing)))}, as {files[0].name} has")
        labels += [None] * opened.metadata.num_rows if label is None else map(_known, _column(file, label))

    def read(positions: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        wanted = set(positions)
        rows = ((f"{file.name}#{row}", cell) for file in files for row, cell in enumerate(_column(file, image)))
        for position, (name, cell) in enumerate(itertools.islice(rows, max(wanted, default=-1) + 1)):
            if position in wanted:
                if not cell.is_valid:
                    raise PayloadError(f"{name}: column {image} holds no bytes there")
                yield name, cell.as_py()

    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return Source(description=f"rows of {files[0].name}{more}", labels=labels, read_files=read)


def _known(cell: Any) -> Label:
    """Hugging Face writes -1 where the labels of a test split are withheld."""
    value = cell.as_py()
    return value if isinstance(value, str) or (isinstance(value, int) and value >= 0) else None


def _open(file: Path) -> Any:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise PayloadError(f"{file} cannot be read, it may be incomplete: {error}") from error


def _column(file: Path, name: str) -> Iterator[Any]:
    """The cells of a column; for encoded images, their bytes."""
    try:
        for batch in _open(file).iter_batches(batch_size=_BATCH_ROWS, columns=[name]):
            cells = batch.column(0)
            if name in _PARQUET_IMAGES:
                cells = cells.field("bytes") if pa.types.is_struct(cells.type) else cells
                if not (pa.types.is_binary(cells.type) or pa.types.is_large_binary(cells.type)):
                    raise PayloadError(f"{file}: column {name} holds {cells.type}, not the bytes of encoded images")
            yield from cells
    except (pa.ArrowException, OSError, KeyError) as error:
        raise PayloadError(f"{file}: column {name} cannot be read: {error}") from error
