"""Blocks on disk: what an interrupted experiment has measured is not measured again."""

from pathlib import Path

import numpy as np
import pytest

from loadtests.experiment.model import HIGH, Block, CapacitySearch
from loadtests.experiment.store import Store, StoreError, whole_rounds
from loadtests.generator.load_result import LoadResult, RequestTrace

TRACE = RequestTrace(
    due_s=np.array([0.0, 0.5, 1.0]),
    statuses=np.array([200, 429, -1]),
    models=np.array(["a", "", "b"], dtype=np.str_),
    ended_ms=np.array([1.5, 0.5, 0.0]),
    behind_ms=np.array([0.1, 0.2, 0.0]),
)


def block(number: int, **changes: object) -> Block:
    load = LoadResult(
        mode="open",
        connections=None,
        offered_rate=30.0,
        throughput=29.5,
        latencies_ms=np.array([1.5, np.inf, 2.25]),
        errors=1,
        peak_bytes=7,
        server_cores=0.5,
        generator_cores=0.1,
        stages_ms={"queue": 0.25},
        trace=TRACE if number else None,
    )
    values: dict[str, object] = {"arm": "a", "round": number, "loads": {HIGH: load}, "info": {"kv_tokens": 3}}
    return Block(**{**values, **changes})  # type: ignore[arg-type]


def test_blocks_and_searches_come_back_as_they_were(tmp_path: Path) -> None:
    store = Store(tmp_path / "blocks")
    assert store.open({"models": ("a", "b")}, fresh=False) == {}
    store.settle({"seconds": 4.0})
    search = CapacitySearch(arm="a", round=0, rate=None, probes=((1.0, None), (2.0, 3.5)), reason="so")
    store.add(block(0), 0)
    store.add(block(1), 1)
    store.add(block(1, failure="it died", loads={}), 3)
    store.add(search, 1)

    again = Store(tmp_path / "blocks")
    assert again.open({"models": ("a", "b")}, fresh=False) == {"seconds": 4.0}
    found = again.blocks()
    assert sorted(found) == [0, 1, 3]
    assert found[0].loads[HIGH].latencies_ms.tolist() == [1.5, np.inf, 2.25]
    assert (found[0].loads[HIGH].stages_ms, found[0].loads[HIGH].trace) == ({"queue": 0.25}, None)
    assert (found[0].arm, found[0].info, found[0].failure) == ("a", {"kv_tokens": 3}, None)
    assert found[1].loads[HIGH].trace is not None
    for name, array in vars(TRACE).items():
        assert getattr(found[1].loads[HIGH].trace, name).tolist() == array.tolist()
    assert (found[3].failure, found[3].loads) == ("it died", {})
    assert again.searches() == {1: search}


def test_another_experiment_in_the_same_folder_is_an_error_that_names_what_differs(tmp_path: Path) -> None:
    store = Store(tmp_path / "blocks")
    store.open({"connections": 16, "seed": 0}, fresh=False)
    store.add(block(0), 0)
    with pytest.raises(StoreError, match=r"another connections: .*--fresh"):
        store.open({"connections": 8, "seed": 0}, fresh=False)
    # That of another command has other fields.
    with pytest.raises(StoreError, match="another steps"):
        store.open({"connections": 16, "seed": 0, "steps": 3}, fresh=False)
    assert store.open({"connections": 8, "seed": 0}, fresh=True) == {}
    # Nothing is lost where no block was measured.
    assert store.open({"connections": 4, "seed": 0}, fresh=False) == {}
    assert store.blocks() == {}


def test_a_block_whose_writing_was_interrupted_does_not_count(tmp_path: Path) -> None:
    store = Store(tmp_path / "blocks")
    store.open({}, fresh=False)
    store.add(block(0), 0)
    (tmp_path / "blocks" / "draft").write_bytes(b"half")
    assert sorted(store.blocks()) == [0]


def test_a_round_is_resumed_as_a_whole_or_not_at_all() -> None:
    found = {number: block(number // 3) for number in (0, 1, 2, 3, 5)}
    assert sorted(whole_rounds(found, 3)) == [0, 1, 2]
