"""Regressions between two runs whose truth is known, read as `compare` writes them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests.experiment.model import HIGH, LOADS, MODERATE, SATURATED, Comparison
from loadtests.report.regress import Regression, ResultsError, notes, read
from loadtests.report.regress import regressions as outcome
from loadtests.report.report import as_json
from loadtests.report.verdicts import judge
from tests.loadtests.report.test_verdicts import changed, comparison


def regressions(old: dict[str, Any], new: Comparison | dict[str, Any], **how: Any) -> list[Regression]:
    return outcome(old, new, **how).worse


def written(measured: Comparison) -> dict[str, Any]:
    """As it comes back from results.json."""
    document: dict[str, Any] = json.loads(json.dumps(as_json(measured, judge(measured)), allow_nan=False))
    return document


def slower(measured: Comparison, *arms: str, factor: float = 0.85) -> Comparison:
    for arm in arms:
        changed(measured, arm, SATURATED, throughput=lambda value: factor * value)
    return measured


def found(results: list[Regression]) -> set[tuple[str, str]]:
    return {(result.arm, result.key) for result in results}


OLD = written(comparison(seed=1))


def test_two_runs_of_the_same_services_show_no_regression_and_need_no_note() -> None:
    assert regressions(OLD, comparison(seed=2)) == []
    assert notes(OLD, comparison(seed=2)) == []


def test_at_most_5_percent_of_equal_runs_are_called_worse() -> None:
    alarms = sum(
        bool(regressions(written(comparison(seed=seed, count=30)), comparison(seed=seed + 1000, count=30), tolerance=0))
        for seed in range(150)
    )
    # 5 % are 7.5. If it were exactly 5 %, more than 16 would come in one of a thousand such simulations.
    assert alarms <= 16


@pytest.mark.parametrize("as_document", [False, True])
def test_a_slower_arm_is_found_in_a_comparison_and_in_its_document(as_document: bool) -> None:
    new = slower(comparison(seed=2), "b")
    (result,) = regressions(OLD, written(new) if as_document else new)
    assert (result.arm, result.key, result.relative) == ("b", "throughput", False)
    assert 0.8 < result.ratio < 0.9
    assert result.low < result.ratio < result.high < 1
    assert result.new < result.old
    assert str(result).startswith("b: throughput went from 5")
    assert "images/s, ×0.8" in str(result)


def test_what_is_better_or_worse_by_less_than_the_tolerance_is_no_regression() -> None:
    assert regressions(OLD, slower(comparison(seed=2), "b", factor=1.2)) == []
    assert regressions(OLD, slower(comparison(seed=2), "b"), tolerance=0.3) == []


def test_more_memory_and_latency_are_found_the_largest_change_first() -> None:
    new = changed(comparison(seed=2), "b", HIGH, latencies_ms=lambda values: 2 * values)
    for load in LOADS:
        changed(new, "a", load, peak_bytes=lambda value: round(3 * value))
    results = regressions(OLD, new)
    assert found(results) == {("b", "high_p50"), ("b", "high_p95"), ("a", "peak_bytes")}
    assert results[0].key == "peak_bytes"


@pytest.mark.parametrize("as_document", [False, True])
def test_percentiles_that_were_never_answered_are_a_regression(as_document: bool) -> None:
    lost = np.arange(100) < 10
    new = changed(comparison(seed=2), "b", HIGH, latencies_ms=lambda values: np.where(lost, math.inf, values))
    (result,) = regressions(OLD, written(new) if as_document else new)
    assert (result.arm, result.key) == ("b", "high_p95")
    assert result.ratio > 2, "infinite, so certainly more than any that was measured"


def test_on_another_machine_only_ratios_to_the_baseline_count() -> None:
    new = slower(comparison(seed=2), "a", "b", "a again", factor=0.5)
    assert ("b", "throughput") in found(regressions(OLD, new))
    new.environment = {"cores": "4"}
    assert regressions(OLD, new) == []
    assert notes(OLD, new) == [
        "The machines differ (cores: 8 and 4): ratios to a were compared, which do not show what made all arms slower."
    ]
    (result,) = regressions(OLD, slower(new, "b"))
    assert (result.arm, result.key, result.relative) == ("b", "throughput", True)
    assert result.old == pytest.approx(1, abs=0.05)
    assert "of the baseline's" in str(result)


def test_on_another_machine_with_another_baseline_the_reader_is_warned() -> None:
    new = comparison(seed=2)
    new.environment = {"cores": "4"}
    new.plan = replace(new.plan, arms=new.plan.arms[1:])
    assert notes(OLD, new) == [
        "The machines differ (cores: 8 and 4): the figures themselves were compared, because the baselines differ too: "
        "do not rely on them.",
        "Not compared, as only in the old results: a.",
    ]


def test_a_baseline_that_became_slower_itself_points_at_the_machine() -> None:
    (note,) = notes(OLD, slower(comparison(seed=2), "a", "b", "a again", factor=0.7))
    assert note.startswith("The baseline a itself answers")
    assert note.endswith("if it was not changed, the machine was slower.")


def test_latencies_at_other_rates_are_not_compared() -> None:
    new = changed(comparison(seed=2), "b", HIGH, latencies_ms=lambda values: 2 * values)
    new.rates = {MODERATE: 101.0, HIGH: 400.0}
    assert regressions(OLD, new) == []
    assert notes(OLD, new) == [
        "Latencies under the high load were not compared: its rate was 340/s and is 400/s.",
    ]


def test_an_arm_that_no_longer_works_is_the_worst_regression() -> None:
    new = slower(comparison(seed=2), "a again")
    new.blocks = [replace(block, failure="it died") if block.arm == "b" else block for block in new.blocks]
    first, second = regressions(OLD, new)
    assert (first.arm, first.key, first.new, first.ratio) == ("b", "throughput", 0, 0)
    assert second.arm == "a again"
    assert notes(OLD, new)[0].startswith("10 blocks of b failed or answered nothing, and 0 in the old results")
    silent = changed(comparison(seed=2), "b", SATURATED, throughput=0.0)
    assert found(regressions(OLD, silent)) == {("b", "throughput")}


def test_missing_arms_and_too_few_blocks_are_noted() -> None:
    new = comparison(seed=2, rounds=3, arms=2)
    assert regressions(OLD, slower(new, "b", factor=0.1)) == []
    assert notes(OLD, new)[-2:] == [
        "Not compared, as only in the old results: a again.",
        "Not compared, with fewer than 5 measured blocks in one of them: a, b.",
    ]


def test_only_results_of_compare_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(ResultsError, match=r"cannot read .*No such file"):
        read(path)
    path.write_text("<html>")
    with pytest.raises(ResultsError, match="is not JSON"):
        read(path)
    for other in ("[]", '{"schema_version": 1}', '{"schema_version": 3}'):
        path.write_text(other)
        with pytest.raises(ResultsError, match="of compare in version 3"):
            read(path)
    path.write_text(json.dumps(OLD))
    assert read(path) == OLD


def test_lost_accuracy_is_a_regression_however_small_if_it_is_no_chance() -> None:
    worse = comparison(seed=2)
    for number, block in enumerate(worse.blocks):
        if block.arm == "b":
            worse.blocks[number] = replace(block, info={"accuracy": {**block.info["accuracy"], "top1": 0.45}})
    (regression,) = regressions(OLD, worse)
    assert (regression.arm, regression.key, regression.old, regression.new) == ("b", "top1", 0.5, 0.45)
    assert "top1 went from 0.5 to 0.45 of the images" in str(regression)
    assert regression.low < 0.9 < regression.high < 1


def test_where_nothing_could_be_compared_nothing_is_known() -> None:
    assert outcome(OLD, comparison(seed=2)).tests > 20
    few = written(comparison(seed=1, rounds=3))
    for info in few["info"].values():
        info["accuracy"] = None
    assert outcome(few, comparison(seed=2)).tests == 0


def test_other_conditions_are_told() -> None:
    other = comparison(seed=2)
    other.plan = replace(other.plan, connections=4)
    other.payloads = "other images"
    said = " ".join(notes(OLD, other))
    assert "connections was 8 and is 4" in said
    assert "payloads was  and is other images" in said
