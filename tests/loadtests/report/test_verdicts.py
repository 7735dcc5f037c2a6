"""Verdicts on comparisons whose truth is known."""

import base64
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from loadtests.experiment.model import HIGH, LOADS, MODERATE, SATURATED, Arm, Block, Comparison, ComparisonPlan
from loadtests.generator.load_result import LoadResult
from loadtests.report.findings import (
    GPU_MEMORY,
    LATENCIES,
    MEMORY,
    THROUGHPUT,
    TOP1,
    Change,
    Findings,
    Metric,
    Row,
)
from loadtests.report.texts import caveats
from loadtests.report.verdicts import counts, judge

ARMS = (Arm(label="a", model="a"), Arm(label="b", model="b"), Arm(label="a again", model="a", repeat_of="a"))
RATES = {MODERATE: 100.0, HIGH: 340.0}
HIGH_P50, HIGH_P95, HIGH_P99 = (metric for metric in LATENCIES if metric.load == HIGH)
MODERATE_P50 = next(metric for metric in LATENCIES if (metric.load, metric.rank) == (MODERATE, 50))


def accuracy(top1: float, split: str = "test", **changes: Any) -> dict[str, Any]:
    return {"accuracy": {"dataset": "d", "split": split, "n": 10_000, "top1": top1, "top5": 0.9, **changes}}


def correct(right: npt.NDArray[np.bool_], labels_sha256: str = "0" * 64) -> dict[str, str]:
    """As a manifest says which images its model gets right."""
    return {"top1": base64.b64encode(np.packbits(right).tobytes()).decode(), "labels_sha256": labels_sha256}


def comparison(*, rounds: int = 10, spread: float = 0.03, count: int = 100, seed: int = 5, arms: int = 3) -> Comparison:
    """Equal arms, whose blocks differ by chance; `count` requests a block and load, in a window of one second."""
    generator = np.random.default_rng(seed)
    blocks = []
    for number in range(rounds):
        drift = 1 + 0.1 * generator.random()
        for arm in ARMS[:arms]:
            speed = float(np.exp(generator.normal(0, spread))) * drift
            loads = {
                name: LoadResult(
                    mode="open" if name in RATES else "closed",
                    connections=None if name in RATES else 8,
                    offered_rate=RATES.get(name),
                    throughput=500 * speed if name == SATURATED else RATES[name],
                    latencies_ms=generator.lognormal(3, 0.3, count) / speed,
                    errors=0,
                    peak_bytes=int(1e8 * math.exp(generator.normal(0, 0.01))),
                    server_cores=1.0,
                    generator_cores=0.3,
                    arrivals=0 if name == SATURATED else count,
                )
                for name in LOADS
            }
            blocks.append(Block(arm=arm.label, round=number, loads=loads, info=accuracy(0.5)))
    return Comparison(
        plan=ComparisonPlan(
            repository=Path("models"),
            arms=ARMS[:arms],
            data=None,
            protocol="v1",
            connections=8,
            seconds=1,
            warmup_seconds=0,
            rounds=rounds,
            default_rounds=10,
            load_fractions=(0.5, 0.85),
            objective_ms=50,
            objective_percentile=99,
            capacity_searches=0,
            budget_minutes=30,
            service_arguments=(),
            seed=1,
        ),
        command="",
        environment={"cores": "8"},
        rates=RATES,
        blocks=blocks,
    )


def changed(measured: Comparison, arm: str, load: str, *, rounds: range = range(99), **changes: Any) -> Comparison:
    """Changes to one arm's loads: values, or functions of the old ones."""

    def new(block: Block) -> Block:
        if block.arm != arm or block.round not in rounds:
            return block
        old = block.loads[load]
        values = {name: value(getattr(old, name)) if callable(value) else value for name, value in changes.items()}
        return replace(block, loads={**block.loads, load: replace(old, **values)})

    measured.blocks = [new(block) for block in measured.blocks]
    return measured


def row(findings: Findings, arm: str, metric: Metric) -> Row:
    found = findings.row(arm, metric)
    assert found is not None
    return found


def change(findings: Findings, arm: str, metric: Metric) -> Change:
    found = row(findings, arm, metric).change
    assert found is not None
    return found


def verdicts(findings: Findings) -> set[tuple[str, Metric, str]]:
    """All but those of no difference."""
    return {
        (row.arm, row.metric, row.change.verdict)
        for row in findings.rows
        if row.change is not None and row.change.verdict != "no difference seen"
    }


def warnings(measured: Comparison) -> list[str]:
    return caveats(measured, judge(measured))


def test_equal_arms_show_no_difference_and_need_no_caveat() -> None:
    findings = judge(comparison())
    assert verdicts(findings) == set()
    assert caveats(comparison(), findings) == []
    assert all(row.change is None for row in findings.rows if row.arm == "a")
    # The first of Holm's levels, for 2 arms of 9 metrics, as none is rejected; p99 of 1,000 requests is among them.
    levels = [row.change.level for row in findings.rows if row.change]
    assert levels == pytest.approx([1 - 0.05 / 18] * 18)


def test_values_are_medians_pooled_percentiles_and_peaks() -> None:
    measured = comparison(rounds=3, count=200)
    for number in range(3):
        changed(measured, "b", SATURATED, rounds=range(number, number + 1), throughput=[10.0, 30.0, 20.0][number])
        changed(measured, "b", HIGH, rounds=range(number, number + 1), peak_bytes=[200_000_000, 7, 300_000_000][number])
        latencies = np.arange(1.0, 201) + 200 * number
        changed(measured, "b", HIGH, rounds=range(number, number + 1), latencies_ms=latencies)
    findings = judge(measured)
    throughput, p50, p99, peak = (row(findings, "b", one) for one in (THROUGHPUT, HIGH_P50, HIGH_P99, MEMORY))
    assert (throughput.value, throughput.smallest, throughput.largest) == (20, 10, 30)
    assert (p50.value, p50.smallest, p50.largest) == (301, 101, 501)
    # 600 samples have six beyond their p99, those of a block have two.
    assert p99.value == 595
    assert p99.smallest is p99.largest is None
    assert (peak.value, peak.largest) == (300, 300)
    assert findings.value("b", TOP1) == 50
    assert findings.metrics == [TOP1, THROUGHPUT, *LATENCIES, MEMORY]


def test_ten_percent_less_throughput_is_worse_and_nothing_else_is() -> None:
    findings = judge(changed(comparison(), "b", SATURATED, throughput=lambda value: 0.9 * value))
    assert verdicts(findings) == {("b", THROUGHPUT, "worse")}
    found = change(findings, "b", THROUGHPUT)
    assert found.low < 0.9 < found.high < 1
    assert found.p_value < 0.05


def test_less_memory_and_less_latency_are_better_in_their_own_units() -> None:
    measured = changed(comparison(count=300), "b", HIGH, latencies_ms=lambda values: values - 5)
    for load in LOADS:
        changed(measured, "b", load, peak_bytes=lambda value: round(0.8 * value))
    findings = judge(measured)
    assert verdicts(findings) == {("b", metric, "better") for metric in (MEMORY, HIGH_P50, HIGH_P95, HIGH_P99)}
    assert change(findings, "b", HIGH_P50).estimate == pytest.approx(-5, abs=0.6)
    assert change(findings, "b", MEMORY).estimate == pytest.approx(0.8, abs=0.01)


def test_accuracy_is_the_manifest_s_and_only_of_the_same_images() -> None:
    measured = comparison(rounds=3)
    measured.blocks = [replace(block, info=accuracy(0.4)) if block.arm == "b" else block for block in measured.blocks]
    findings = judge(measured)
    assert verdicts(findings) == {("b", TOP1, "worse")}, "it needs no rounds"
    assert change(findings, "b", TOP1).estimate == pytest.approx(-10)
    measured.blocks = [
        replace(block, info=accuracy(0.4, "validation")) for block in measured.blocks if block.arm == "b"
    ]
    measured.blocks += comparison(rounds=3).blocks_of("a")
    found = row(judge(measured), "b", TOP1)
    assert (found.value, found.change) == (40, None)
    measured.blocks = [replace(block, info={"accuracy": None}) for block in measured.blocks]
    assert judge(measured).value("b", TOP1) is None


def test_accuracies_are_compared_image_by_image_where_both_manifests_list_their_right_answers() -> None:
    right, other = np.arange(10_000) < 5000, np.arange(10_000) < 5000
    other[4950:5120] = ~other[4950:5120]  # 50 that only the baseline has right, 120 that only the other has right
    infos = {"a": accuracy(0.5, correct=correct(right)), "b": accuracy(0.507, correct=correct(other))}

    def seen(**changes: Any) -> Change:
        measured = comparison(rounds=3)
        by_arm = {**infos, "b": {"accuracy": {**infos["b"]["accuracy"], **changes}}}
        measured.blocks = [replace(block, info=by_arm.get(block.arm, infos["a"])) for block in measured.blocks]
        return change(judge(measured), "b", TOP1)

    paired = seen()
    assert paired.verdict == "better"
    assert paired.estimate == pytest.approx(0.7)
    assert 0.2 < paired.low < paired.high < 1.2
    for changes in ({"correct": None}, {"correct": correct(other, "1" * 64)}, {"correct": {"top1": "?"}}, {"n": 9_999}):
        independent = seen(**changes)
        assert independent.verdict == "no difference seen"
        assert independent.estimate == pytest.approx(0.7)
        assert independent.low < -0.5


def test_too_few_rounds_or_samples_give_no_interval() -> None:
    findings = judge(comparison(rounds=4))
    assert {row.metric for row in findings.rows if row.arm == "b" and row.change} == {TOP1}
    # 10 blocks of 9 requests: 90 have fewer than five beyond p95.
    findings = judge(comparison(count=9))
    unknown = {row.metric for row in findings.rows if row.arm == "b" and row.value is None}
    assert unknown == {metric for metric in LATENCIES if metric.rank != 50}
    assert row(findings, "b", HIGH_P95).change is None
    assert row(findings, "b", HIGH_P50).change is not None


def test_memory_that_is_unknown_is_neither_shown_nor_compared() -> None:
    measured = comparison()
    for load in LOADS:
        changed(measured, "b", load, peak_bytes=0)
    found = row(judge(measured), "b", MEMORY)
    assert (found.value, found.change) == (None, None)


def test_an_arm_that_leaves_requests_unanswered_does_not_look_fast() -> None:
    def fail(latencies: Any) -> Any:
        return np.where(np.arange(len(latencies)) < 3, math.inf, latencies / 2)

    measured = changed(comparison(), "b", HIGH, latencies_ms=fail, errors=3)
    findings = judge(measured)
    assert findings.value("b", HIGH_P99) == math.inf
    found = change(findings, "b", HIGH_P99)
    assert (found.verdict, found.estimate, found.high) == ("worse", math.inf, math.inf)
    assert change(findings, "b", HIGH_P50).verdict == "better"
    assert counts(measured, "b") == {"blocks": 10, "failed_blocks": 0, "requests": 3000, "errors": 30, "unsent": 0}
    assert caveats(measured, findings) == [
        "30 requests to b were not answered with 200 and 0 were not sent, of 3,000 that were due: "
        "they count as infinitely slow."
    ]


def test_only_rounds_that_both_arms_finished_are_paired() -> None:
    # In the round that b failed, a was a thousand times as slow: unpaired, that would hide any difference.
    measured = changed(comparison(), "b", SATURATED, throughput=lambda value: 0.9 * value)
    changed(measured, "a", SATURATED, rounds=range(4, 5), throughput=0.5)
    changed(measured, "a again", SATURATED, rounds=range(4, 5), throughput=0.5)
    measured.blocks = [
        replace(block, failure="it died.") if (block.arm, block.round) == ("b", 4) else block
        for block in measured.blocks
    ]
    findings = judge(measured)
    assert verdicts(findings) == {("b", THROUGHPUT, "worse")}
    assert (counts(measured, "b")["blocks"], counts(measured, "b")["failed_blocks"]) == (9, 1)
    assert caveats(measured, findings) == ["1 of 10 blocks of b failed and do not count: it died."]


def test_an_a_a_arm_that_differs_is_the_machine_s_doing() -> None:
    assert warnings(changed(comparison(), "a again", SATURATED, throughput=lambda value: 0.8 * value)) == [
        "Noise floor: a, measured a second time as if it were another arm, differs from itself in images/s at "
        "saturation. The machine makes such differences, not the models: do not believe others of that size here."
    ]


@pytest.mark.parametrize(("rounds", "said"), [(6, "result."), (3, "result; there are no intervals with fewer than 5.")])
def test_fewer_rounds_than_the_default_are_a_quick_look(rounds: int, said: str) -> None:
    assert warnings(comparison(rounds=rounds)) == [f"{rounds} of 10 rounds: a quick look, not a {said}"]


def test_a_round_that_lacks_an_arm_is_not_counted() -> None:
    measured = comparison()
    del measured.blocks[-1]
    assert warnings(measured) == ["9 of 10 rounds: a quick look, not a result."]


@pytest.mark.parametrize(
    ("load", "changes", "words"),
    [
        (
            SATURATED,
            {"generator_cores": 0.97},
            "The generator used 0.97 of a core with b at saturation: there it was the limit",
        ),
        (
            HIGH,
            {"late_arrivals": 2},
            "The generator sent requests 5 ms or more late: 2.0% with b at 340/s. The highest",
        ),
        (HIGH, {"throughput": 80.0}, "Overloaded: b at 340/s (answered 80/s). The latency there grows"),
        (SATURATED, {"server_cores": 7.9}, "Server and generator share the machine and together used up to 8.2"),
    ],
)
def test_what_limits_a_load_is_said(load: str, changes: dict[str, Any], words: str) -> None:
    (warning,) = warnings(changed(comparison(), "b", load, **changes))
    assert warning.startswith(words)


def test_nothing_is_late_in_a_closed_loop() -> None:
    assert warnings(changed(comparison(), "b", SATURATED, late_arrivals=1)) == []


def test_the_most_important_caveat_comes_first() -> None:
    measured = comparison(rounds=6)
    measured.ended_early = "interrupted"
    changed(measured, "a again", SATURATED, throughput=lambda value: 0.5 * value)
    changed(measured, "b", HIGH, unsent_arrivals=1, late_arrivals=50, throughput=1.0, server_cores=8.0)
    measured.blocks[1] = replace(measured.blocks[1], failure="no memory")
    starts = ["1 of 6 blocks", "0 requests to b", "Noise floor: a, measured", "6 of 10 rounds", "The generator sent"]
    starts += ["The run ended early: interrupted.", "Overloaded", "Server and generator"]
    said = warnings(measured)
    assert len(said) == len(starts)
    assert all(caveat.startswith(start) for caveat, start in zip(said, starts, strict=True))


def test_on_a_gpu_its_memory_is_what_is_compared() -> None:
    measured = comparison()
    for arm, used in (("a", 4e9), ("a again", 4e9), ("b", 3e9)):
        measured = changed(measured, arm, HIGH, device_bytes=int(used))
    found = row(judge(measured), "b", GPU_MEMORY)
    assert found.value == 3e3
    assert found.change is not None
    assert found.change.verdict == "better"
    assert found.change.estimate == pytest.approx(0.75)
    # Memory of one kind is not compared with the other.
    measured = changed(measured, "b", HIGH, rounds=range(1), device_bytes=None)
    assert judge(measured).value("b", MEMORY) == pytest.approx(1e2, rel=0.1)
    assert any("some blocks only" in caveat for caveat in warnings(measured))


def test_an_arm_of_which_nothing_was_measured_is_said_so() -> None:
    measured = comparison()
    measured.blocks = [block for block in measured.blocks if block.arm != "b"]
    findings = judge(measured)
    assert caveats(measured, findings)[0] == "No block of b was measured."
    assert all(row.value is None and row.change is None for row in findings.rows if row.arm == "b")


@pytest.mark.parametrize(("count", "most"), [(60, 9), pytest.param(200, 20, marks=pytest.mark.long)])
def test_at_most_5_percent_of_whole_reports_on_equal_arms_see_a_difference(count: int, most: int) -> None:
    alarms = sum(bool(verdicts(judge(comparison(seed=seed, count=60)))) for seed in range(count))
    # If it were exactly 5 %, more than `most` would come in one of a thousand such simulations.
    assert alarms <= most
