"""How an experiment runs, on servers that are made up: order, loads, failures, and what is resumed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtests.experiment import run
from loadtests.experiment.model import Arm, Experiment, Load, Plan
from loadtests.experiment.server import ServerError, ServerStartError
from loadtests.experiment.store import StoreError
from loadtests.generator.load_result import LoadResult
from tests.loadtests.experiment.benches import FakeBench, Notes, plan, result

CLOSED, OPEN = Load(name="closed", connections=4), Load(name="open", fraction=0.5)


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SETTLE_SECONDS", 0.0)


def answers(arm: Arm, load: Load) -> LoadResult:
    return result(load, throughput=100.0)


def measure(bench: FakeBench, **options: Any) -> Notes:
    notes = Notes()
    with bench.opened(notes, fresh=options.pop("fresh", False)):
        bench.rounds(lambda _: [CLOSED, OPEN], notes, **options)
    return notes


def experiment(of: Plan, **environment: str) -> Experiment[Plan]:
    return Experiment(plan=of, command="", environment=environment)


def test_every_block_has_a_server_of_its_own_and_all_loads(tmp_path: Path) -> None:
    found = experiment(plan("a", "b"))
    bench = FakeBench(found, tmp_path, answers)
    notes = measure(bench, further_steps=3)
    first, second = [block.arm for block in found.blocks[:2]], [block.arm for block in found.blocks[2:]]
    assert sorted(first) == ["a", "b"]
    # There and back again.
    assert second == first[::-1]
    assert bench.started == [f"round{block.round + 1:02d}-{block.arm}" for block in found.blocks]
    assert [step for step, _, _ in notes.steps[:2]] == [f"round 1 of 2, {arm}" for arm in first]
    assert [[done, total] for _, done, total in notes.steps] == [[number, 4 + 3] for number in range(4)]
    # An open loop at a fraction of what the closed one has reached.
    assert bench.loads[:2] == [(first[0], CLOSED), (first[0], replace(OPEN, rate=50.0))]
    for block in found.blocks:
        assert block.failure is None
        assert (block.idle_bytes, block.after_bytes, block.info) == (1, 1, {"kv_tokens": 3})
        assert list(block.loads) == ["closed", "open"]


def test_a_server_that_fails_loses_its_block_and_the_others_are_measured(tmp_path: Path) -> None:
    def fail_in_the_first(arm: Arm, load: Load) -> LoadResult:
        if arm.label == "a" and len([label for label, _ in bench.loads if label == "a"]) == 1:
            raise ServerError("it died under load:\nits log")
        return answers(arm, load)

    found = experiment(plan("a", "b"))
    bench = FakeBench(found, tmp_path, fail_in_the_first)
    measure(bench)
    (failed,) = found.failures
    assert (failed.arm, failed.round, failed.loads) == ("a", 0, {})
    assert "it died under load" in str(failed.failure)
    assert Counter(block.arm for block in found.blocks) == {"a": 2, "b": 2}
    assert [block.round for block in found.blocks_of("a")] == [1]


def test_an_arm_that_never_starts_ends_the_experiment(tmp_path: Path) -> None:
    def refuse(arm: Arm) -> None:
        if arm.label == "b":
            raise ServerStartError("it did not start")

    found = experiment(plan("a", "b"))
    bench = FakeBench(found, tmp_path, answers)
    bench.before_start = refuse
    with pytest.raises(ServerStartError):
        measure(bench)
    # One that has started before only loses the block.
    bench.before_start = lambda _: None
    measure(bench, fresh=True)
    bench.before_start = refuse
    measure(bench, fresh=True)
    assert Counter(block.arm for block in found.failures) == {"b": 2}


def test_an_interrupted_experiment_is_resumed_at_whole_rounds(tmp_path: Path) -> None:
    def interrupt(arm: Arm) -> None:
        if len(bench.started) == 5:
            raise KeyboardInterrupt

    found = experiment(plan("a", "b", rounds=3), cpu="x")
    bench = FakeBench(found, tmp_path, answers)
    bench.before_start = interrupt
    with pytest.raises(KeyboardInterrupt):
        measure(bench)
    assert len(found.blocks) == 5

    resumed = experiment(plan("a", "b", rounds=3), cpu="x")
    again = FakeBench(resumed, tmp_path, answers)
    measure(again)
    assert [(block.arm, block.round) for block in resumed.blocks[:4]] == [(b.arm, b.round) for b in found.blocks[:4]]
    assert (len(resumed.blocks), len(again.started)) == (6, 2)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (experiment(plan("a", "b", seconds=2.0)), "seconds"),
        (experiment(plan("a", "c")), "arms"),
        (experiment(plan("a", "b"), commit="another"), "environment"),
    ],
)
def test_another_experiment_is_not_resumed(changed: Experiment[Plan], what: str, tmp_path: Path) -> None:
    measure(FakeBench(experiment(plan("a", "b")), tmp_path, answers))
    with pytest.raises(StoreError, match=f"another {what}"):
        measure(FakeBench(changed, tmp_path, answers))
    measure(FakeBench(changed, tmp_path, answers), fresh=True)
    assert len(changed.blocks) == 4


def test_an_experiment_may_be_stopped_between_rounds(tmp_path: Path) -> None:
    found = experiment(plan("a", "b", rounds=3))
    measure(FakeBench(found, tmp_path, answers), stop=lambda number: "enough" if number == 2 else None)
    assert (found.ended_early, len(found.blocks)) == ("enough", 4)
