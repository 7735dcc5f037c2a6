"""The blocks of a comparison on disk, one by one, so that it goes on where it was interrupted."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.errors import LoadTestError
from loadtests.experiment.model import Block, CapacitySearch
from loadtests.generator.load_result import LoadResult

_PLAN = "plan.json"


class StoreError(LoadTestError):
    """The folder holds another comparison; the message says what to do."""


class Store:
    """The folder `blocks` of a comparison that is not finished."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, asked: dict[str, Any], *, fresh: bool) -> dict[str, Any]:
        """Begin, or go on with what `asked` for the same: gives what `settle` has kept then. Raises StoreError."""
        if fresh:
            self.clear()
        asked = json.loads(json.dumps(asked))
        kept = self._folder / _PLAN
        if kept.is_file():
            found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            differing = sorted(name for name in asked if found["asked"].get(name) != asked[name])
            if differing and any(self._folder.glob("[0-9]*.json")):
                raise StoreError(
                    f"{self._folder.parent} holds a comparison that was begun with another {', '.join(differing)}: "
                    "give the same again to go on with it, --fresh to drop it, or another --out"
                )
            if not differing:
                settled: dict[str, Any] = found["settled"]
                return settled
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write(kept, {"asked": asked, "settled": {}})
        return {}

    def settle(self, settled: dict[str, Any]) -> None:
        """Keep what was decided at the start, and must stay."""
        kept = self._folder / _PLAN
        found = json.loads(kept.read_text(encoding="utf-8"))
        self._write(kept, {**found, "settled": settled})

    def add(self, block: Block, number: int) -> None:
        """Keep a block, whole or not at all."""
        values = asdict(block)
        latencies = {name: values["loads"][name].pop("latencies_ms") for name in values["loads"]}
        np.savez_compressed(self._folder / f"{number:04d}.npz", allow_pickle=False, **latencies)
        self._write(self._folder / f"{number:04d}.json", values)

    def add_search(self, search: CapacitySearch, number: int) -> None:
        """Keep a search."""
        self._write(self._folder / f"search-{number:04d}.json", asdict(search))

    def blocks(self) -> dict[int, Block]:
        """All that were kept, by number."""
        found = {}
        for path in sorted(self._folder.glob("[0-9]*.json")):
            values = json.loads(path.read_text(encoding="utf-8"))
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as latencies:
                loads = {
                    name: LoadResult(**load, latencies_ms=latencies[name]) for name, load in values.pop("loads").items()
                }
            found[int(path.stem)] = replace(Block(**values), loads=loads)
        return found

    def searches(self) -> dict[int, CapacitySearch]:
        """All that were kept, by number."""
        found = {}
        for path in sorted(self._folder.glob("search-*.json")):
            values = json.loads(path.read_text(encoding="utf-8"))
            probes = tuple((rate, latency) for rate, latency in values.pop("probes"))
            found[int(path.stem.removeprefix("search-"))] = CapacitySearch(**values, probes=probes)
        return found

    def clear(self) -> None:
        """Drop all of it: it is finished, or not wanted."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, path: Path, values: dict[str, Any]) -> None:
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(values), encoding="utf-8")
        draft.replace(path)
