"""Regressions between two runs whose truth is known, read as `compare` writes them."""

import json
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests.experiment.model import HIGH, LOADS, MODERATE, SATURATED, CapacitySearch, Comparison
from loadtests.report.document import ResultsError, as_document, from_document, read_results
from loadtests.report.findings import MEMORY, THROUGHPUT, TOP1, Change, Row
from loadtests.report.regressions import find_regressions as outcome
from loadtests.report.regressions import notes, sentence
from loadtests.report.verdicts import judge
from loadtests.statistics import percentile
from tests.loadtests.report.fakes import read_back
from tests.loadtests.report.test_verdicts import ARMS, accuracy, changed, comparison, correct


def find_regressions(old: Comparison, new: Comparison, **how: Any) -> list[Row]:
    return outcome(old, new, **how).worse


def document(measured: Comparison) -> dict[str, Any]:
    """What stands in results.json."""
    return read_back(as_document(measured, judge(measured), []))


def written(measured: Comparison) -> Comparison:
    """As it comes back from results.json."""
    return from_document(document(measured))


def slower(measured: Comparison, *arms: str, factor: float = 0.85) -> Comparison:
    for arm in arms:
        changed(measured, arm, SATURATED, throughput=lambda value: factor * value)
    return measured


def found(results: list[Row]) -> set[tuple[str, str | None, str]]:
    return {(result.arm, result.metric.load, result.metric.name) for result in results}


def change(row: Row) -> Change:
    assert row.change is not None
    return row.change


OLD = written(comparison(seed=1))


def test_two_runs_of_the_same_services_show_no_regression_and_need_no_note() -> None:
    assert find_regressions(OLD, comparison(seed=2)) == []
    assert notes(OLD, comparison(seed=2)) == []


@pytest.mark.parametrize(("count", "most"), [(40, 7), pytest.param(150, 16, marks=pytest.mark.long)])
def test_at_most_5_percent_of_equal_runs_are_called_worse(count: int, most: int) -> None:
    alarms = sum(
        bool(find_regressions(comparison(seed=seed, count=30), comparison(seed=seed + 1000, count=30), tolerance=0))
        for seed in range(count)
    )
    # If it were exactly 5 %, more than `most` would come in one of a thousand such simulations.
    assert alarms <= most


@pytest.mark.parametrize("reads", [False, True])
def test_a_slower_arm_is_found_in_a_comparison_and_in_its_document(reads: bool) -> None:
    new = slower(comparison(seed=2), "b")
    (result,) = find_regressions(OLD, written(new) if reads else new)
    assert (result.arm, result.metric) == ("b", THROUGHPUT)
    assert 0.8 < change(result).estimate < 0.9
    assert change(result).low < change(result).estimate < change(result).high < 1
    assert result.value is not None
    assert result.base is not None
    assert result.value < result.base
    assert sentence(result).startswith("b: images/s at saturation went from 5")
    assert ", ×0.8" in sentence(result)


def test_what_is_better_or_worse_by_less_than_the_tolerance_is_no_regression() -> None:
    assert find_regressions(OLD, slower(comparison(seed=2), "b", factor=1.2)) == []
    assert find_regressions(OLD, slower(comparison(seed=2), "b"), tolerance=0.3) == []


def test_more_memory_and_latency_are_found_the_largest_change_first() -> None:
    new = changed(comparison(seed=2), "b", HIGH, latencies_ms=lambda values: 2 * values)
    for load in LOADS:
        changed(new, "a", load, peak_bytes=lambda value: round(3 * value))
    results = find_regressions(OLD, new)
    assert found(results) == {("b", "high", "p50_ms"), ("b", "high", "p95_ms"), ("a", None, "peak_mb")}
    assert results[0].metric == MEMORY
    assert sentence(results[0]).startswith("a: peak memory went from 10")
    assert "to 30" in sentence(results[0])


@pytest.mark.parametrize("reads", [False, True])
def test_percentiles_that_were_never_answered_are_a_regression(reads: bool) -> None:
    lost = np.arange(100) < 10
    new = changed(comparison(seed=2), "b", HIGH, latencies_ms=lambda values: np.where(lost, math.inf, values))
    (result,) = find_regressions(OLD, written(new) if reads else new)
    assert found([result]) == {("b", "high", "p95_ms")}
    assert change(result).estimate > 2, "infinite, so certainly more than any that was measured"


def test_on_another_machine_only_ratios_to_the_baseline_count() -> None:
    new = slower(comparison(seed=2), "a", "b", "a again", factor=0.5)
    assert ("b", SATURATED, "images_per_second") in found(find_regressions(OLD, new))
    new.environment = {"cores": "4"}
    assert find_regressions(OLD, new) == []
    assert notes(OLD, new) == [
        "The machines differ (cores: 8 and 4): ratios to a were compared, which do not show what made all arms slower."
    ]
    (result,) = find_regressions(OLD, slower(new, "b"))
    assert found([result]) == {("b", SATURATED, "images_per_second")}
    assert result.base == pytest.approx(1, abs=0.05)
    assert "of the baseline's" in sentence(result)


def test_on_another_machine_with_another_baseline_the_reader_is_warned() -> None:
    new = comparison(seed=2)
    new.environment = {"cores": "4"}
    new.plan = replace(new.plan, arms=new.plan.arms[1:])
    assert notes(OLD, new) == [
        "The machines differ (cores: 8 and 4): the values themselves were compared, because the baselines differ too: "
        "do not rely on them.",
        "Not compared, because only in the old results: a.",
    ]


def test_a_baseline_that_became_slower_itself_points_at_the_machine() -> None:
    (note,) = notes(OLD, slower(comparison(seed=2), "a", "b", "a again", factor=0.7))
    assert note.startswith("The baseline a itself answers")
    assert note.endswith("if it was not changed, the machine was slower.")


def test_latencies_at_other_rates_are_not_compared() -> None:
    new = changed(comparison(seed=2), "b", HIGH, latencies_ms=lambda values: 2 * values)
    new.rates = {MODERATE: 101.0, HIGH: 400.0}
    assert find_regressions(OLD, new) == []
    assert notes(OLD, new) == [
        "Latencies under the high load were not compared: its rate was 340/s and is 400/s.",
    ]


def test_an_arm_that_no_longer_works_is_the_worst_regression() -> None:
    new = slower(comparison(seed=2), "a again")
    new.blocks = [replace(block, failure="it died") if block.arm == "b" else block for block in new.blocks]
    first, second = find_regressions(OLD, new)
    assert (first.arm, first.metric, first.value, change(first).estimate) == ("b", THROUGHPUT, 0, 0)
    assert second.arm == "a again"
    assert notes(OLD, new)[0].startswith("10 blocks of b failed or answered nothing, and 0 in the old results")
    silent = changed(comparison(seed=2), "b", SATURATED, throughput=0.0)
    assert found(find_regressions(OLD, silent)) == {("b", SATURATED, "images_per_second")}


def test_missing_arms_and_too_few_blocks_are_noted() -> None:
    new = comparison(seed=2, rounds=3, arms=2)
    assert find_regressions(OLD, slower(new, "b", factor=0.1)) == []
    assert notes(OLD, new)[-2:] == [
        "Not compared, because only in the old results: a again.",
        "Not compared, with fewer than 5 measured blocks in one of them: a, b.",
    ]


def test_only_results_of_compare_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(ResultsError, match=r"cannot read .*No such file"):
        read_results(path)
    path.write_text("<html>")
    with pytest.raises(ResultsError, match="is not JSON"):
        read_results(path)
    for other in ("[]", '{"schema_version": 2}', '{"schema_version": 4}'):
        path.write_text(other)
        with pytest.raises(ResultsError, match=r"in version 3 .*: measure the old state again with `str"):
            read_results(path)
    path.write_text('{"schema_version": 3}')
    with pytest.raises(ResultsError, match="is not laid out as compare writes it"):
        read_results(path)


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    measured = comparison(seed=1)
    measured.plan = replace(measured.plan, arms=(replace(ARMS[0], settings=(("max_batch", "1"),)), *ARMS[1:]))
    measured.finished = datetime(2026, 11, 23, 4, 5, tzinfo=UTC)
    measured.capacity_searches = [CapacitySearch(arm="b", round=0, rate=None, probes=(), reason="too slow")]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document(measured)))
    read = read_results(path)
    assert (read.plan, read.rates, read.environment) == (measured.plan, measured.rates, measured.environment)
    assert (read.finished, read.capacity_searches) == (measured.finished, measured.capacity_searches)
    for block, same in zip(measured.blocks, read.blocks, strict=True):
        assert same.info == block.info
        for name, load in block.loads.items():
            percentiles = {f"p{rank}_ms": percentile(load.latencies_ms, rank) for rank in (50, 95, 99)}
            expected = replace(load, latencies_ms=same.loads[name].latencies_ms, percentiles_ms=percentiles)
            assert same.loads[name] == expected


def test_lost_accuracy_is_a_regression_however_small_if_it_is_no_chance() -> None:
    def with_top1(top1: float, **changes: Any) -> Comparison:
        measured = comparison(seed=2)
        info = accuracy(top1, **changes)
        measured.blocks = [replace(block, info=info) if block.arm == "b" else block for block in measured.blocks]
        return measured

    (regression,) = find_regressions(OLD, with_top1(0.45))
    assert (regression.arm, regression.metric, regression.base, regression.value) == ("b", TOP1, 50, 45)
    assert "top-1 went from 50 to 45 %" in sentence(regression)
    assert change(regression).low < -5 < change(regression).high < 0
    # Image by image, less is enough.
    right = np.arange(10_000) < 5000
    before, after = (with_top1(top1, correct=correct(right)) for top1 in (0.5, 0.494))
    assert find_regressions(before, with_top1(0.494)) == []
    assert find_regressions(before, after) == []
    worse = with_top1(0.494, correct=correct(np.arange(10_000) < 4940))
    assert found(find_regressions(before, worse)) == {("b", None, "top1_percent")}


def test_where_nothing_could_be_compared_nothing_is_known() -> None:
    assert outcome(OLD, comparison(seed=2)).tests > 20
    few = comparison(seed=1, rounds=3)
    few.blocks = [replace(block, info={"accuracy": None}) for block in few.blocks]
    assert outcome(few, comparison(seed=2)).tests == 0


def test_other_conditions_are_told() -> None:
    other = comparison(seed=2)
    other.plan = replace(other.plan, connections=4)
    other.payloads = "other images"
    said = " ".join(notes(OLD, other))
    assert "connections was 8 and is 4" in said
    assert "payloads was  and is other images" in said
