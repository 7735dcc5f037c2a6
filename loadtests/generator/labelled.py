"""Images on disk and their labels: folders of files, folders of class folders, parquet files.

A source knows how many images it holds and how they are labelled before it reads any of them, and reads them one after
the other: a validation split of several gigabytes need not fit into memory.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from loadtests.errors import LoadTestError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
LABELS_FILE = "labels.csv"
_LABEL_COLUMNS = ("index", "label", "imagenet1k_index")
"""The first of them that there is; `python -m training images` writes an index and a name."""
_IMAGE_COLUMNS = ("img", "image")
_PARQUET_LABELS = ("fine_label", "label")
_SPLITS = ("test-*.parquet", "validation-*.parquet", "val-*.parquet", "*.parquet")
_ROWS = 256
"""Rows that are in memory at once."""

Label = int | str | None
"""A class by its index or by its name; None where it is not known."""


class PayloadError(LoadTestError):
    """The images to send cannot be had; the message says what was expected where."""


@dataclass(frozen=True, slots=True)
class Payload:
    """One image as it is sent."""

    name: str
    """Of its file, or its file and row."""
    data: bytes = field(repr=False)
    label: Label = None


class Source(Protocol):
    """Images that can be had one after the other."""

    @property
    def words(self) -> str:
        """What they are, to follow their number: `files of photos/`."""

    @property
    def labels(self) -> Sequence[Label]:
        """One for each image."""

    def read(self, wanted: Iterable[int]) -> Iterator[Payload]:
        """The images at these positions, which must ascend. Raises PayloadError."""


def source_of(folder: Path) -> Source:
    """What `folder` holds: image files, parquet files, or class folders, in this order of preference.

    Raises PayloadError.
    """
    if not folder.is_dir():
        raise PayloadError(f"{folder} is not a folder: --data names a folder of image files or parquet files")
    files = _images_in(folder)
    if files:
        table = folder / LABELS_FILE
        labels = _read_labels(table, files) if table.is_file() else [None] * len(files)
        return _Files(words=f"files of {folder.resolve().name}/", root=folder, files=files, labels=labels)
    for pattern in _SPLITS:
        if tables := sorted(folder.glob(pattern)):
            return _tables(tables)
    classes = [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    found = [(file, child.name) for child in classes for file in _images_in(child)]
    if found:
        files = [file for file, _ in found]
        return _Files(
            words=f"files of {len({name for _, name in found})} classes in {folder.resolve().name}/",
            root=folder,
            files=files,
            labels=_typed([name for _, name in found]),
        )
    inside = next((child for child in classes if child.name in ("test", "val", "validation", "data")), None)
    hint = f"; did you mean {inside}?" if inside else ""
    raise PayloadError(
        f"{folder} holds neither image files ({', '.join(IMAGE_SUFFIXES)}) nor parquet files, "
        f"nor class folders of image files{hint}"
    )


@dataclass(frozen=True, kw_only=True)
class _Files:
    words: str
    root: Path
    files: Sequence[Path] = field(repr=False)
    labels: Sequence[Label] = field(repr=False)

    def read(self, wanted: Iterable[int]) -> Iterator[Payload]:
        for index in wanted:
            file = self.files[index]
            try:
                yield Payload(file.relative_to(self.root).as_posix(), file.read_bytes(), self.labels[index])
            except OSError as error:
                raise PayloadError(f"{file} cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True, kw_only=True)
class _Tables:
    words: str
    files: Sequence[Path]
    column: str
    labels: Sequence[Label] = field(repr=False)

    def read(self, wanted: Iterable[int]) -> Iterator[Payload]:
        ahead = iter(wanted)
        index = next(ahead, None)
        start = 0
        for file in self.files:
            position = 0
            for images in _column(file, self.column):
                while index is not None and index < start + len(images):
                    name = f"{file.name}#{position + index - start}"
                    image = images[index - start].as_py()
                    if image is None:
                        raise PayloadError(f"{name}: column {self.column} holds no bytes there")
                    yield Payload(name, image, self.labels[index])
                    index = next(ahead, None)
                if index is None:
                    return
                start += len(images)
                position += len(images)


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not file.name.startswith(".")
    )


def _tables(files: Sequence[Path]) -> _Tables:
    names = _schema(files[0]).names
    column = next((name for name in _IMAGE_COLUMNS if name in names), None)
    if column is None:
        raise PayloadError(f"{files[0]} has no column img or image: it has {', '.join(names)}")
    label = next((name for name in _PARQUET_LABELS if name in names), None)
    labels: list[Label] = []
    for file in files:
        missing = {column, label} - {None, *_schema(file).names}
        if missing:
            raise PayloadError(f"{file} has no column {', '.join(sorted(map(str, missing)))}, as {files[0].name} has")
        if label is None:
            labels += [None] * _opened(file).metadata.num_rows
        else:
            labels += [_known(value) for rows in _column(file, label) for value in rows.to_pylist()]
    words = f"rows of {files[0].name}" if len(files) == 1 else f"rows of {files[0].name} and {len(files) - 1} more"
    return _Tables(words=words, files=files, column=column, labels=labels)


def _known(value: object) -> Label:
    """Hugging Face writes -1 where a test split's labels are withheld."""
    if isinstance(value, int):
        return value if value >= 0 else None
    return value if isinstance(value, str) else None


def _schema(file: Path) -> Any:
    return _opened(file).schema_arrow


def _opened(file: Path) -> Any:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise PayloadError(f"{file} cannot be read, it may be incomplete: {error}") from error


def _column(file: Path, name: str) -> Iterator[Any]:
    """The column's rows, some at a time; of encoded images, their bytes."""
    try:
        for batch in _opened(file).iter_batches(batch_size=_ROWS, columns=[name]):
            rows = batch.column(0)
            if name in _IMAGE_COLUMNS:
                rows = rows.field("bytes") if pa.types.is_struct(rows.type) else rows
                if not (pa.types.is_binary(rows.type) or pa.types.is_large_binary(rows.type)):
                    raise PayloadError(f"{file}: column {name} holds {rows.type}, not the bytes of encoded images")
            yield rows
    except (pa.ArrowException, OSError, KeyError) as error:
        raise PayloadError(f"{file}: column {name} cannot be read: {error}") from error


def _read_labels(table: Path, files: Sequence[Path]) -> list[Label]:
    """The labels of `files`, None for those that the table leaves out or empty."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows, columns = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PayloadError(f"{table} cannot be read: {error}") from error
    column = next((name for name in _LABEL_COLUMNS if name in columns), None)
    if column is None or "file" not in columns:
        raise PayloadError(
            f"{table} needs a column file, and a column index, label (an index or a class's name) or "
            f"imagenet1k_index: it has {', '.join(columns) or 'none'}"
        )
    given = {row["file"]: (row[column] or "").strip() for row in rows}
    missing = sorted(set(given) - {file.name for file in files}, key=str)
    if missing:
        raise PayloadError(f"{table} names {len(missing)} files that are not in its folder, {missing[0]!r} among them")
    return _typed([given.get(file.name, "") for file in files])


def _typed(names: Sequence[str]) -> list[Label]:
    """Indices where all labels are numbers, else names: a class may be called `2009` among others."""
    numbers = all(name.isascii() and name.isdigit() for name in names if name)
    return [None if not name else int(name) if numbers else name for name in names]
