"""Packed weights that several processes share: one file for all, found by its content.

Each process packs for itself, as it proves for itself. The results are mostly identical, byte for byte; then the first
process's files serve all, and the system keeps their pages once.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path


def shared(packed: Path, folder: Path) -> Path:
    """The same model in `folder`, where others may have it already; `packed` itself if there is no room for it.

    A model that is there already is used only if it is identical: its name is a digest of its content.
    """
    files = sorted(packed.parent.glob("packed.*"))
    target = folder / _digest(files)
    with contextlib.suppress(OSError):
        if not target.is_dir():
            new = Path(tempfile.mkdtemp(prefix=".", dir=folder))
            try:
                for file in files:
                    os.link(file, new / file.name)
                # Another process may be faster.
                with contextlib.suppress(OSError):
                    new.rename(target)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        if (target / packed.name).is_file():
            return target / packed.name
    return packed


def clear(folder: Path, pids: Iterable[int]) -> None:
    """Remove what none of these processes maps. No process may be loading meanwhile."""
    maps = ""
    for pid in pids:
        with contextlib.suppress(OSError):
            maps += Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    for path in folder.iterdir():
        if str(path) not in maps:
            shutil.rmtree(path, ignore_errors=True)


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name}:{os.fstat(stream.fileno()).st_size}:".encode())
            while part := stream.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()
