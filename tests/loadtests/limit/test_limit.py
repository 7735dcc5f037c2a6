"""The service against the engine limit and a plain server: the report's arithmetic, and a short run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.experiment.model import Arm, Block
from loadtests.generator.load_result import LoadResult
from loadtests.limit.measure import LimitExperiment, LimitPlan, closed_name, with_references
from loadtests.limit.report import POOLED, figures, ratio, ratios, tables_of, write

THOUSAND = np.arange(1.0, 1001.0)
"""Milliseconds: p50 501, p99 991."""
OPEN = "open loop at 70%"


def load(connections: int | None, throughput: float, *, scale: float, peak: int) -> LoadResult:
    return LoadResult(
        mode="closed" if connections else "open",
        connections=connections,
        offered_rate=None if connections else throughput,
        throughput=throughput,
        latencies_ms=THOUSAND * scale,
        errors=1,
        peak_bytes=peak,
        server_cores=1.5,
        generator_cores=0.25,
        arrivals=0 if connections else 50,
        unsent_arrivals=0 if connections else 3,
    )


@pytest.fixture
def experiment() -> LimitExperiment:
    plan = LimitPlan(
        repository=Path("models"),
        arms=with_references([Arm(label="m", model="m")]),
        data=None,
        rounds=2,
        seconds=1.0,
        warmup_seconds=0.5,
        connections=(1, 32),
        load_fraction=0.7,
    )
    found = LimitExperiment(plan=plan, command="python -m loadtests limit", environment={"cpu": "test"})
    engine = {"batch_size": 4, "baseline_pss_bytes": 60_000_000, "versions": {"onnxruntime": "1"}}
    # The machine is half as fast in round 1.
    for number, speed in ((0, 1.0), (1, 0.5)):
        service = {
            closed_name(1): load(1, 40 * speed, scale=0.01, peak=105_000_000),
            closed_name(32): load(32, 90 * speed, scale=0.1, peak=110_000_000 + 10_000_000 * number),
            OPEN: load(None, 63 * speed, scale=0.015, peak=110_000_000),
        }
        plain = {
            closed_name(1): load(1, 40 * speed, scale=0.02, peak=100_000_000),
            closed_name(32): load(32, 60 * speed, scale=0.2, peak=180_000_000),
        }
        found.blocks += [
            Block(arm="engine limit", round=number, info={**engine, "images_per_second": 100.0 * speed}),
            Block(arm="m", round=number, idle_bytes=100_000_000, loads=service),
            Block(arm="plain server", round=number, idle_bytes=100_000_000, loads=plain),
        ]
    return found


def test_each_model_has_its_engine_limit_and_its_plain_server() -> None:
    old = Arm(label="a@git:v0.1", model="a", commit="0" * 40)
    labels = [arm.label for arm in with_references([Arm(label="a", model="a"), old])]
    assert labels == ["a", "a@git:v0.1", "engine limit", "plain server"]
    two = with_references([Arm(label="a", model="a"), Arm(label="b", model="b")])
    assert [(arm.label, arm.model) for arm in two if arm.kind != "service"] == [
        ("engine limit of a", "a"),
        ("plain server of a", "a"),
        ("engine limit of b", "b"),
        ("plain server of b", "b"),
    ]


def test_only_the_service_has_an_open_loop_after_its_closed_ones(experiment: LimitExperiment) -> None:
    names = {arm.label: [load.name for load in experiment.plan.loads(arm)] for arm in experiment.plan.arms}
    closed = ["1 connection", "32 connections"]
    assert names == {"m": [*closed, OPEN], "engine limit": [], "plain server": closed}


def test_ratios_are_paired_by_round(experiment: LimitExperiment) -> None:
    found = {one.name: one for one in ratios(experiment)}
    # Paired, the slow round does not show.
    assert found["m / engine limit, images/s, 32 connections"].values == {0: 0.9, 1: 0.9}
    assert found["plain server / engine limit, images/s, 32 connections"].median == pytest.approx(0.6)
    assert found["m / plain server, images/s, 32 connections"].median == pytest.approx(1.5)
    assert found["m / plain server, p50, 1 connection"].median == pytest.approx(0.5)
    assert found["m, p99 / p50, 32 connections"].median == pytest.approx(991 / 501)
    opened = found["m, p99 in the open loop at 70% / p50 at 1 connection"]
    assert opened.median == pytest.approx(1.5 * 991 / 501)
    memory = found["m, peak memory above idle, 32 connections"]
    assert memory.values == pytest.approx({0: 10, 1: 20})
    assert [memory.name, "15.00 (10.00–20.00) %", "–"] in tables_of(experiment)[1].rows
    assert found["plain server, peak memory above idle, 32 connections"].median == pytest.approx(80)
    assert found["m idle, memory above ONNX Runtime and model alone"].values == {0: 40, 1: 40}


def test_another_commit_is_set_against_the_first_arm_of_its_model(experiment: LimitExperiment) -> None:
    old = Arm(label="m@git:v0.1", model="m", commit="0" * 40)
    experiment.plan = replace(experiment.plan, arms=with_references([experiment.plan.arms[0], old]), rounds=5)
    for number in range(2, 5):
        experiment.blocks += [replace(block, round=number) for block in experiment.blocks[:3]]
    for block in experiment.blocks_of("m"):
        speed = 0.8 + 0.01 * block.round
        slower = {name: replace(load, throughput=load.throughput * speed) for name, load in block.loads.items()}
        experiment.blocks.append(replace(block, arm=old.label, loads=slower))
    found = {one.name: one for one in ratios(experiment)}[f"{old.label} / m, images/s, 32 connections"]
    assert found.median == pytest.approx(0.82)
    assert found.interval
    assert 0.79 < found.interval[0] < found.median < found.interval[1] < 0.85
    assert any(row[0] == f"{old.label} / m, images/s, 32 connections" for row in tables_of(experiment)[1].rows)


def test_fewer_than_five_rounds_have_no_interval(experiment: LimitExperiment) -> None:
    assert {one.interval for one in ratios(experiment)} == {None}


def test_percentiles_are_medians_of_rounds_or_pooled_where_a_round_holds_too_few(experiment: LimitExperiment) -> None:
    plain, load = experiment.plan.arms[-1], closed_name(1)
    assert figures(experiment, plain, load)["p99 ms"] == pytest.approx({0: 19.82, 1: 19.82})
    for block in experiment.blocks_of(plain.label):
        block.loads[load] = replace(block.loads[load], latencies_ms=np.full(300, 10.0 + block.round))
    found = figures(experiment, plain, load)
    assert (found["p50 ms"], found["p99 ms"]) == ({POOLED: 11}, {POOLED: 11})
    row = next(row for row in tables_of(experiment)[0].rows if row[:2] == [plain.label, load])
    assert row[3:6] == ["11.0*", "11.0*", "1.00*"]


def test_a_ratio_falls_back_to_medians_where_rounds_do_not_pair() -> None:
    assert ratio({0: 2.0, 1: 6.0}, {0: 1.0, 1: 2.0, 2: 9.0}) == {0: 2, 1: 3}
    assert ratio({POOLED: 6.0}, {0: 1.0, 1: 3.0}) == {POOLED: 3}
    assert ratio({0: 1.0}, {0: 0.0}) == {}
    assert ratio({}, {0: 1.0}) == {}


def test_the_report_holds_every_arm(experiment: LimitExperiment, tmp_path: Path) -> None:
    rows = {(row[0], row[1]): row for row in tables_of(experiment)[0].rows}
    assert rows["engine limit", "batch 4"][2] == "75.0 (50.0–100.0)"
    assert rows["m", OPEN][-1] == "2 (of 100: unsent 6, late 0)"
    assert {name for name, _ in rows} == {"m", "engine limit", "plain server"}
    write(experiment, tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "| engine limit | batch 4 | 75.0 (50.0–100.0) |" in page
    assert "- onnxruntime: 1" in page
    document = json.loads((tmp_path / "results.json").read_text())
    assert len(document["blocks"]) == 6
    assert document["blocks"][1]["loads"][OPEN]["generator_cores"] == 0.25


def test_a_measurement_that_ended_early_is_reported(experiment: LimitExperiment, tmp_path: Path) -> None:
    experiment.blocks, experiment.ended_early = experiment.blocks[:1], "interrupted"
    write(experiment, tmp_path)
    assert "Ended early: interrupted" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["ratios"] == []


def test_a_failed_block_is_named_in_the_report(experiment: LimitExperiment, tmp_path: Path) -> None:
    experiment.blocks[1] = Block(arm="m", round=0, failure="the service died")
    write(experiment, tmp_path)
    assert "m, round 1: the service died" in (tmp_path / "report.md").read_text()


@pytest.mark.long
def test_limit_measures_every_arm_and_reports(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few batch sizes to try, so that the engine limit is soon there.
    monkeypatch.setenv("STRIDEVIT_MAX_BATCH", "2")
    tiny = ["--rounds", "1", "--seconds", "3", "--warmup", "0", "--connections", "2", "--command", "as asked"]
    asked = ["--models", "digits-csra-r2", "--repository", str(repository), "--out", str(tmp_path), *tiny]
    ended = CliRunner().invoke(app, ["limit", *asked])
    assert ended.exit_code == 0, ended.output
    document = json.loads((tmp_path / "results.json").read_text())
    blocks = {block["arm"]: block for block in document["blocks"]}
    assert blocks.keys() == {"digits-csra-r2", "engine limit", "plain server"}
    assert blocks["engine limit"]["info"]["images_per_second"] > 0
    loads = {(arm, name): load for arm, block in blocks.items() for name, load in block["loads"].items()}
    closed = closed_name(2)
    assert loads.keys() == {("digits-csra-r2", closed), ("digits-csra-r2", OPEN), ("plain server", closed)}
    for name, load in loads.items():
        assert load["answered"] > 0, name
        assert load["errors"] == 0, name
        assert load["peak_bytes"] > 30_000_000, name
        assert load["server_cores"] > 0, name
        assert load["generator_cores"] > 0, name
    saturated = loads["digits-csra-r2", closed]["throughput"]
    assert loads["digits-csra-r2", OPEN]["offered_rate"] == pytest.approx(0.7 * saturated)
    names = [one["name"] for one in document["ratios"]]
    assert f"digits-csra-r2 / engine limit, images/s, {closed}" in names
    assert f"digits-csra-r2 / plain server, images/s, {closed}" in names
    page = (tmp_path / "report.md").read_text()
    assert "as asked" in page
    assert str(tmp_path) not in page
    # What is finished is not resumed.
    assert not (tmp_path / "blocks").exists()
