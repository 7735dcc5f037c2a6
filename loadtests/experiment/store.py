"""The blocks of an experiment on disk, one by one, so that an interrupted one can be resumed."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtests.errors import LoadTestError
from loadtests.experiment.model import Block, CapacitySearch
from loadtests.generator.load_result import LoadResult, RequestTrace

_PLAN = "plan.json"
_TRACE = ("due_s", "statuses", "models")


class StoreError(LoadTestError):
    """The folder holds another experiment; the message says what to do."""


class Store:
    """The folder `blocks` of an experiment that is not finished."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, fingerprint: dict[str, Any], *, fresh: bool) -> dict[str, Any]:
        """Begin, or resume what has the same fingerprint: returns what `settle` has kept then. Raises StoreError."""
        if fresh:
            self.clear()
        fingerprint = json.loads(json.dumps(fingerprint))
        kept = self._folder / _PLAN
        if kept.is_file():
            found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            names = fingerprint.keys() | found["fingerprint"].keys()
            differing = sorted(name for name in names if found["fingerprint"].get(name) != fingerprint.get(name))
            if differing and any(self._folder.glob("[0-9]*.json")):
                raise StoreError(
                    f"{self._folder.parent} holds a measurement that was begun with another {', '.join(differing)}: "
                    "run it again as it was begun to resume it, give --fresh to discard it, or another --out"
                )
            if not differing:
                settled: dict[str, Any] = found["settled"]
                return settled
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write(kept, {"fingerprint": fingerprint, "settled": {}})
        return {}

    def settle(self, settled: dict[str, Any]) -> None:
        """Keep what was decided at the start, and must stay the same."""
        kept = self._folder / _PLAN
        self._write(kept, {**json.loads(kept.read_text(encoding="utf-8")), "settled": settled})

    def add(self, block: Block, number: int) -> None:
        """Keep a block, whole or not at all."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        values = asdict(block)
        for name, load in values["loads"].items():
            arrays[name] = load.pop("latencies_ms")
            arrays |= {f"{name}/{field}": array for field, array in (load.pop("trace") or {}).items()}
        np.savez_compressed(self._folder / f"{number:04d}.npz", allow_pickle=False, **arrays)
        self._write(self._folder / f"{number:04d}.json", values)

    def add_search(self, search: CapacitySearch, number: int) -> None:
        """Keep a capacity search."""
        self._write(self._folder / f"search-{number:04d}.json", asdict(search))

    def blocks(self) -> dict[int, Block]:
        """All blocks that were kept, by number."""
        found = {}
        for path in sorted(self._folder.glob("[0-9]*.json")):
            values = json.loads(path.read_text(encoding="utf-8"))
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
                loads = {name: _load(name, load, dict(arrays)) for name, load in values.pop("loads").items()}
            found[int(path.stem)] = replace(Block(**values), loads=loads)
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
        draft.write_text(json.dumps(values), encoding="utf-8")
        draft.replace(path)


def _load(name: str, values: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> LoadResult:
    traced = f"{name}/{_TRACE[0]}" in arrays
    trace = RequestTrace(**{field: arrays[f"{name}/{field}"] for field in _TRACE}) if traced else None
    return LoadResult(**values, latencies_ms=arrays[name], trace=trace)


def whole_rounds(blocks: dict[int, Block], arms: int) -> dict[int, Block]:
    """The blocks of complete rounds: resuming within a round would pair blocks of different days."""
    return {
        number: block
        for number, block in blocks.items()
        if all(number // arms * arms + place in blocks for place in range(arms))
    }
