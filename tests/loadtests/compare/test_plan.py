"""What a comparison decides when every arm has been tried, on servers that are made up."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtests.compare.compare import compare
from loadtests.experiment import run
from loadtests.experiment.arms import repeated
from loadtests.experiment.model import HIGH, MODERATE, SATURATED, Arm, Comparison, Load
from loadtests.experiment.server import Server, ServerError
from loadtests.generator.load_result import LoadResult
from tests.loadtests.experiment.benches import PAYLOADS, FakeBench, Notes, comparison_plan, result

SPEED = {"fast": 200.0, "slow": 100.0}


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SETTLE_SECONDS", 0.0)


def comparison(rates: dict[str, float] | None = None, **changes: Any) -> Comparison:
    arms = (Arm(label="fast", model="fast"), Arm(label="slow", model="slow"))
    plan = comparison_plan(*arms, repeated(arms[0]), **{"seconds": 4.0, "rounds": 2, **changes})
    return Comparison(plan=plan, command="", environment={}, rates=rates or {})


def answers(arm: Arm, load: Load) -> LoadResult:
    return result(load, throughput=SPEED[arm.model])


def compared(found: Comparison, out: Path) -> tuple[FakeBench, Notes]:
    bench, notes = FakeBench(found, out, answers), Notes()
    compare(bench, found, notes, fresh=False)
    return bench, notes


def test_the_slowest_arm_decides_the_rates_which_are_the_same_for_all(tmp_path: Path) -> None:
    found = comparison()
    bench, notes = compared(found, tmp_path)
    assert found.rates == {MODERATE: 30.0, HIGH: 70.0}
    # 16 connections at 100 images per second wait 160 ms.
    assert (found.plan.seconds, found.plan.rounds, found.plan.objective_ms) == (4.0, 2, 200.0)
    # The A/A arm need not be tried.
    assert bench.started[:2] == ["calibration-fast", "calibration-slow"]
    assert len(found.blocks) == 6
    assert all(list(block.loads) == [MODERATE, HIGH, SATURATED] for block in found.blocks)
    assert [search.arm for search in found.capacity_searches] == ["fast", "slow"]
    (summary,) = notes.notes
    assert "2 rounds of 3 arms" in summary
    assert "30/s and 70/s" in summary


def test_a_resumed_comparison_keeps_what_was_decided(tmp_path: Path) -> None:
    compared(comparison(), tmp_path)
    again = comparison(budget_minutes=60.0)
    bench, _ = compared(again, tmp_path)
    assert (bench.started, len(again.blocks), len(again.capacity_searches)) == ([], 6, 2)
    assert again.rates == {MODERATE: 30.0, HIGH: 70.0}


def test_rates_of_an_earlier_report_are_kept(tmp_path: Path) -> None:
    found = comparison(rates={MODERATE: 5.0, HIGH: 6.0})
    compared(found, tmp_path)
    assert found.rates == {MODERATE: 5.0, HIGH: 6.0}


def test_a_spent_budget_ends_the_comparison_after_two_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("loadtests.compare.compare.time.monotonic", lambda: now[0])
    found = comparison(rounds=10, budget_minutes=10.0)

    def slowly(arm: Arm, load: Load) -> LoadResult:
        # Trying the arms takes no time, a load then ten minutes.
        now[0] += 600.0 if bench.started[-1].startswith("round") else 0.0
        return answers(arm, load)

    bench = FakeBench(found, tmp_path, slowly)
    compare(bench, found, Notes(), fresh=False)
    assert found.ended_early == "the budget of 10 minutes was spent after 2 of 10 rounds"
    assert len(found.blocks) == 6
    assert found.capacity_searches == []


@pytest.mark.parametrize(
    ("found", "applied", "fails"),
    [([(0, 0), (9, 0)], 2, False), ([(0, 0), (0, 0)], 2, True), ([(0, 4)], 1, True), ([(9, 4)], 1, False)],
)
def test_a_closed_loop_in_which_nothing_happened_is_repeated_once(
    found: list[tuple[float, int]], applied: int, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saturate = Load(name=SATURATED, connections=16)
    results = [replace(result(saturate, throughput=rate), errors=errors) for rate, errors in found]
    left = iter(results)
    monkeypatch.setattr(run, "apply_load", lambda *_, **__: next(left))
    bench = run.Bench(comparison(), PAYLOADS, tmp_path)
    server = Server("http://nowhere", name="the server")
    with pytest.raises(ServerError, match="answered nothing") if fails else nullcontext():
        assert bench.apply(Arm(label="a", model="a"), server, saturate, seconds=1, seed=0) is results[-1]
    assert len(list(left)) == len(found) - applied


def test_a_search_whose_server_fails_has_no_rate(tmp_path: Path) -> None:
    found = comparison()

    def die_in_a_search(arm: Arm, load: Load) -> LoadResult:
        if load.name == "probe":
            raise ServerError("it died under load:\nits log")
        return answers(arm, load)

    compare(FakeBench(found, tmp_path, die_in_a_search), found, Notes(), fresh=False)
    first = found.capacity_searches[0]
    assert (first.rate, first.failed, first.reason) == (None, True, "it died under load:")
