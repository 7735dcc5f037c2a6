"""The blocks of an experiment on disk, one by one, so that an interrupted one can be resumed."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.errors import LoadTestError
from loadtests.experiment.model import Block, CapacitySearch
from loadtests.generator.load_result import LoadResult, RequestTrace


class StoreError(LoadTestError):
    """The folder holds another experiment; the message says what to do."""


class Store:
    """The folder `blocks` of an experiment that is not finished: one JSON file per block or capacity search."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._plan = folder / "plan.json"

    def open(self, fingerprint: dict[str, Any], *, fresh: bool) -> dict[str, Any]:
        """Begin, or resume what has the same fingerprint: returns what `settle` has kept then. Raises StoreError."""
        if fresh:
            self.clear()
        fingerprint = json.loads(json.dumps(fingerprint))
        if self._plan.is_file():
            kept: dict[str, dict[str, Any]] = json.loads(self._plan.read_text(encoding="utf-8"))
            names = fingerprint.keys() | kept["fingerprint"].keys()
            differing = sorted(name for name in names if kept["fingerprint"].get(name) != fingerprint.get(name))
            if not differing:
                return kept["settled"]
            if any(self._folder.glob("[0-9]*.json")):
                raise StoreError(
                    f"{self._folder.parent} holds a measurement that was begun with another {', '.join(differing)}: "
                    "run it again as it was begun to resume it, give --fresh to discard it, or another --out"
                )
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write(self._plan, {"fingerprint": fingerprint, "settled": {}})
        return {}

    def settle(self, settled: dict[str, Any]) -> None:
        """Keep what was decided at the start, and must stay the same."""
        self._write(self._plan, {**json.loads(self._plan.read_text(encoding="utf-8")), "settled": settled})

    def add(self, block: Block, number: int) -> None:
        """Keep a block, whole or not at all."""
        self._write(self._folder / f"{number:04d}.json", asdict(block))

    def add_search(self, search: CapacitySearch, number: int) -> None:
        """Keep a capacity search."""
        self._write(self._folder / f"search-{number:04d}.json", asdict(search))

    def blocks(self) -> dict[int, Block]:
        """All blocks that were kept, by number."""
        found = {}
        for path in sorted(self._folder.glob("[0-9]*.json")):
            values = json.loads(path.read_text(encoding="utf-8"))
            loads = {name: _load(**load) for name, load in values.pop("loads").items()}
            found[int(path.stem)] = Block(**values, loads=loads)
        return found

    def searches(self) -> dict[int, CapacitySearch]:
        """All capacity searches that were kept, by number."""
        found = {}
        for path in sorted(self._folder.glob("search-*.json")):
            values = json.loads(path.read_text(encoding="utf-8"))
            probes = tuple((rate, latency) for rate, latency in values.pop("probes"))
            found[int(path.stem.removeprefix("search-"))] = CapacitySearch(**values, probes=probes)
        return found

    def clear(self) -> None:
        """Discard everything: it is finished, or not wanted."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, path: Path, values: dict[str, Any]) -> None:
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(values, default=np.ndarray.tolist), encoding="utf-8")
        draft.replace(path)


def _load(latencies_ms: list[float], trace: dict[str, list[Any]] | None, **values: Any) -> LoadResult:
    arrays = RequestTrace(**{name: np.array(column) for name, column in trace.items()}) if trace else None
    return LoadResult(**values, latencies_ms=np.array(latencies_ms, dtype=np.float64), trace=arrays)


def whole_rounds(blocks: dict[int, Block], arms: int) -> dict[int, Block]:
    """The blocks of complete rounds: resuming within a round would pair blocks of different days."""
    return {
        number: block
        for number, block in blocks.items()
        if all(number // arms * arms + place in blocks for place in range(arms))
    }
