"""The blocks of an experiment on disk, one by one, so that an interrupted one can be resumed."""

import shutil
from pathlib import Path
from typing import Any, TypeVar

from loadtests.errors import LoadTestError
from loadtests.experiment.json_files import pack, unpack
from loadtests.experiment.model import Block, CapacitySearch

T = TypeVar("T", Block, CapacitySearch)


class StoreError(LoadTestError):
    """The folder holds another experiment; the message says what to do."""


class Store:
    """The folder `blocks` of an experiment that is not finished: its fingerprint, and a file per block or search."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, fingerprint: dict[str, Any], *, fresh: bool) -> dict[str, Any]:
        """Begin, or resume what has the same fingerprint and return what `settle` kept. Raises StoreError."""
        if fresh:
            self.clear()
        # As it will be read back: paths as text, tuples as lists.
        fingerprint = unpack(pack(fingerprint), dict)
        if kept := self._read("fingerprint"):
            differing = sorted(name for name in fingerprint | kept if kept.get(name) != fingerprint.get(name))
            if not differing:
                return self._read("settled")
            if self.holds_blocks():
                raise StoreError(
                    f"{self._folder.parent} holds a measurement that was begun with another {', '.join(differing)}: "
                    "run it again as it was begun to resume it, give --fresh to discard it, or another --out"
                )
        self._folder.mkdir(parents=True, exist_ok=True)
        self.settle({})
        self._write("fingerprint", fingerprint)
        return {}

    def settle(self, settled: dict[str, Any]) -> None:
        """Keep what was decided at the start, and must stay the same."""
        self._write("settled", settled)

    def add(self, measured: Block | CapacitySearch, number: int) -> None:
        """Keep a block or a search, whole or not at all."""
        self._write(f"{type(measured).__name__}-{number:04d}", measured)

    def holds_blocks(self) -> bool:
        """Whether a block was kept."""
        return any(self._folder.glob(f"{Block.__name__}-*"))

    def blocks(self) -> dict[int, Block]:
        """All blocks that were kept, by number."""
        return self._kept(Block)

    def searches(self) -> dict[int, CapacitySearch]:
        """All capacity searches that were kept, by number."""
        return self._kept(CapacitySearch)

    def clear(self) -> None:
        """Discard everything: it is finished, or not wanted."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str, value: Any) -> None:
        draft = self._folder / "draft"
        draft.write_bytes(pack(value))
        draft.replace(self._folder / name)

    def _kept(self, kind: type[T]) -> dict[int, T]:
        files = sorted(self._folder.glob(f"{kind.__name__}-*"))
        return {int(file.name.rpartition("-")[2]): unpack(file.read_bytes(), kind) for file in files}

    def _read(self, name: str) -> dict[str, Any]:
        file = self._folder / name
        return unpack(file.read_bytes(), dict) if file.is_file() else {}


def whole_rounds(blocks: dict[int, Block], arms: int) -> dict[int, Block]:
    """The blocks of complete rounds: resuming within a round would pair blocks of different days."""
    return {
        number: block
        for number, block in blocks.items()
        if all(number // arms * arms + place in blocks for place in range(arms))
    }
