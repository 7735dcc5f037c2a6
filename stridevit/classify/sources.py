"""The images that the arguments of a command name."""

import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import typer

from stridevit.classify.many import Source

SUFFIXES: Final = frozenset(
    {".avif", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
"""Suffixes of the files in a folder that are sent."""


def named(arguments: Sequence[str]) -> list[Source]:
    """The images that the arguments name, each once and in order. Raises BadParameter."""
    found: dict[str, Source] = {}
    for argument in arguments:
        path = Path(argument)
        if argument == "-" and argument in found:
            raise typer.BadParameter("`-` is given twice: standard input can be read only once")
        if argument == "-":
            found[argument] = Source(argument, sys.stdin.buffer.read())
        elif path.is_dir():
            before = len(found)
            found |= {source.name: source for source in _images_in(path)}
            if len(found) == before:
                raise typer.BadParameter(f"no images in {path}: their names end with {', '.join(sorted(SUFFIXES))}")
        elif path.exists():
            found[_shown(path)] = Source(_shown(path), path)
        else:
            raise typer.BadParameter(f"no such file or folder: {path}")
    return list(found.values())


def _images_in(folder: Path) -> Iterator[Source]:
    """Image files in a folder and below, in order, not those that are hidden; and folders that cannot be read."""
    unread = list[OSError]()
    for parent, folders, files in os.walk(folder, onerror=unread.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith(".") and _may_be_read(path):
                yield Source(_shown(path), path)
    for error in unread:
        yield Source(_shown(Path(error.filename)), error)


def _may_be_read(path: Path) -> bool:
    """Whether it is no pipe, socket or device, which may never end. A broken link is left to the reader's error."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def _shown(path: Path) -> str:
    """A path as one line of text, whatever characters it has; different for each, and no formula in a spreadsheet."""
    text = "".join(
        letter if letter.isprintable() and letter != "\\" else letter.encode("unicode_escape").decode("ascii")
        for letter in path.as_posix()
    )
    return f"./{text}" if text.startswith(("=", "+", "-", "@")) else text
