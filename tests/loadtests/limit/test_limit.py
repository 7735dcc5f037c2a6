"""The service against the engine limit and a plain server: the report's arithmetic, the open loop, and all of it."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from loadtests.experiment.server import ServerError, running
from loadtests.generator.load_result import LoadResult
from loadtests.limit.measure import Arm, Drive, Plan, Results, newest
from loadtests.limit.report import POOLED, as_json, markdown, ratio, ratios, rows
from loadtests.soak.soak import LONGER_SIDES, Soak, mixed_sizes
from tests.processes import ROOT, serving
from tests.service.conftest import encoded, noise

PLAIN = "loadtests.baseline.plain_fastapi"
THOUSAND = np.arange(1.0, 1001.0)
"""Milliseconds: p50 500.5, p99 990.01."""


def plan(**changes: object) -> Plan:
    values: dict[str, object] = {
        "repository": Path("models"),
        "model": "m",
        "data": None,
        "rounds": 2,
        "seconds": 1.0,
        "warmup_seconds": 0.5,
        "connections": (1, 32),
        "load_fraction": 0.7,
        "service_arguments": (),
    }
    return Plan(**{**values, **changes})  # type: ignore[arg-type]


def drive(number: int, arm: Arm, connections: int | None, throughput: float, *, scale: float, peak: int) -> Drive:
    return Drive(
        round=number,
        arm=arm,
        idle_bytes=100_000_000,
        load=LoadResult(
            connections=connections,
            mode="closed" if connections else "open",
            offered_rate=None if connections else throughput,
            throughput=throughput,
            latencies_ms=THOUSAND * scale,
            errors=1,
            peak_bytes=peak,
            server_cores=1.5,
            generator_cores=0.25,
            arrivals=0 if connections else 50,
            unsent_arrivals=0 if connections else 3,
        ),
    )


@pytest.fixture
def results() -> Results:
    found = Results(plan=plan(), command="python -m loadtests limit", environment={"cpu": "test"})
    said = {
        "images_per_second": 100.0,
        "batch_size": 4,
        "baseline_pss_bytes": 60_000_000,
        "versions": {"onnxruntime": "1"},
    }
    found.limits = {0: said, 1: {**said, "images_per_second": 50.0, "batch_size": 8}}
    for number, share in ((0, 1.0), (1, 0.5)):
        found.drives += [
            drive(number, "service", 1, 40 * share, scale=0.01, peak=105_000_000),
            drive(number, "service", 32, 90 * share, scale=0.1, peak=110_000_000 + 10_000_000 * number),
            drive(number, "service", None, 63 * share, scale=0.015, peak=110_000_000),
            drive(number, "plain", 1, 40 * share, scale=0.02, peak=100_000_000),
            drive(number, "plain", 32, 60 * share, scale=0.2, peak=180_000_000),
        ]
    found.finished = datetime(2026, 1, 1, tzinfo=UTC)
    return found


def test_arms_turn_round_so_that_drift_hits_all_alike() -> None:
    assert list(plan().steps()) == [
        (0, "engine"),
        (0, "service"),
        (0, "plain"),
        (1, "plain"),
        (1, "service"),
        (1, "engine"),
    ]


def test_ratios_are_paired_by_round(results: Results) -> None:
    found = {one.name: one for one in ratios(results)}
    # The machine was half as fast in round 1: paired, that does not show.
    assert found["service / engine limit, images/s at 32 connections"].values == {0: 0.9, 1: 0.9}
    assert found["plain / engine limit, images/s at 32 connections"].median == pytest.approx(0.6)
    assert found["service / plain, images/s at 32 connections"].median == pytest.approx(1.5)
    assert found["service / plain, p50 at 1 connection"].median == pytest.approx(0.5)
    assert found["service, p99 / p50 at 32 connections"].median == pytest.approx(990.01 / 500.5)
    opened = found["service, p99 at 70% load (open loop) / p50 at 1 connection"]
    assert opened.median == pytest.approx(1.5 * 990.01 / 500.5)
    memory = found["service, peak memory above idle at 32 connections"]
    assert memory.values == pytest.approx({0: 10, 1: 20})
    assert memory.text == "15.00 (10.00–20.00) %"
    assert found["plain, peak memory above idle at 32 connections"].median == pytest.approx(80)
    assert found["service idle, memory above ONNX Runtime and model alone"].values == {0: 40, 1: 40}


def test_percentiles_are_medians_of_rounds_or_pooled_where_a_round_holds_too_few(results: Results) -> None:
    service = rows(results)[0]
    assert (service.arm, service.connections) == ("service", 1)
    assert service.p99_ms == pytest.approx({0: 9.9001, 1: 9.9001})
    few = [drive(number, "plain", 1, 10, scale=1, peak=1) for number in (0, 1)]
    results.drives = [
        Drive(
            round=one.round,
            arm=one.arm,
            idle_bytes=1,
            load=LoadResult(**{**vars(one.load), "latencies_ms": np.full(300, 10.0 + one.round)}),
        )
        for one in few
    ]
    (plain,) = rows(results)
    assert plain.p50_ms == {POOLED: 10.5}
    assert plain.p99_ms == {POOLED: 11}
    assert "11.0*" in markdown(results)


def test_a_ratio_falls_back_to_medians_where_rounds_do_not_pair() -> None:
    assert ratio({0: 2.0, 1: 6.0}, {0: 1.0, 1: 2.0, 2: 9.0}) == {0: 2, 1: 3}
    assert ratio({POOLED: 6.0}, {0: 1.0, 1: 3.0}) == {POOLED: 3}
    assert ratio({0: 1.0}, {0: 0.0}) == {}
    assert ratio({}, {0: 1.0}) == {}


def test_report_holds_every_arm_and_survives_a_measurement_that_ended_early(results: Results) -> None:
    page = markdown(results)
    for expected in (
        "| engine limit | batch 4/8 | 75.0 (50.0–100.0) |",
        "| service | 1 conn. |",
        "| service | 70%, open loop |",
        "2 (of 100: unsent 6, late 0)",
        "| plain | 32 conn. |",
        "- onnxruntime: 1",
    ):
        assert expected in page, expected
    document = json.loads(json.dumps(as_json(results)))
    assert len(document["drives"]) == 10
    assert document["drives"][0]["generator_cores"] == 0.25
    results.drives, results.finished, results.ended_early = [], None, "interrupted"
    assert "Ended early: interrupted" in markdown(results)
    results.limits = {}
    assert json.loads(json.dumps(as_json(results)))["ratios"] == []


def test_the_plain_server_answers_like_the_service(repository: Path, tmp_path: Path) -> None:
    bundle = newest(repository, "digits-csra-r2")
    command = [sys.executable, "-m", PLAIN, str(bundle), "--port"]
    # The service lets libjpeg scale a large JPEG down before it resizes it: almost the same pixels.
    images = [
        (encoded(noise(seed=0)), 1e-5),
        (encoded(noise(320, 200, seed=1), "JPEG"), 0.01),
        (encoded(noise(33, 70, seed=2).convert("L")), 1e-5),
    ]
    with (
        serving(repository) as (url, _),
        running(lambda port: [*command, str(port)], name="plain", log=tmp_path / "log") as plain,
    ):
        for image, tolerance in images:
            path = "/v1/classify?model=digits-csra-r2"
            ours = httpx.post(url + path, content=image).json()["results"][0]["predictions"]
            theirs = httpx.post(plain.url + path, content=image).json()["results"][0]["predictions"]
            assert len(theirs) == 5
            assert theirs[0]["label"] == ours[0]["label"]
            assert theirs[0]["probability"] == pytest.approx(ours[0]["probability"], abs=tolerance)


def test_a_model_without_a_version_is_an_error(repository: Path) -> None:
    with pytest.raises(ServerError, match="no version of it"):
        newest(repository, "no-such-model")


def test_soak_compares_the_first_tenth_of_the_requests_with_the_last() -> None:
    soak = Soak(
        model="m",
        requests=100,
        errors=0,
        payloads="",
        samples=[(0, 50), (5, 100), (10, 102), (50, 300), (90, 1), (95, 103), (98, 105), (100, 104)],
        ended_early=None,
        environment={},
        command="",
        finished=datetime(2026, 1, 1, tzinfo=UTC),
    )
    assert (soak.idle_bytes, soak.first_bytes, soak.last_bytes, soak.most_bytes) == (50, 101, 104, 300)
    assert soak.growth == pytest.approx(3 / 101)


def test_soak_sends_each_image_in_several_sizes() -> None:
    images, what = mixed_sizes(None)
    assert len(set(images)) == 8 * len(LONGER_SIDES)
    assert max(map(len, images)) > 50 * min(map(len, images))
    assert "48 JPEGs" in what


def command(repository: Path, out: Path, *arguments: str) -> list[str]:
    base = [sys.executable, "-m", "loadtests", "limit", "--repository", str(repository), "--out", str(out)]
    return [*base, "--model", "digits-csra-r2", *arguments]


def run(*asked: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(asked, cwd=ROOT, check=False, capture_output=True, text=True, timeout=200)


def test_limit_measures_every_arm_and_reports(repository: Path, tmp_path: Path) -> None:
    tiny = ["--rounds", "1", "--seconds", "1", "--warmup", "0.5", "--connections", "1,4"]
    ended = run(*command(repository, tmp_path, *tiny, "--command", "as asked"))
    assert ended.returncode == 0, ended.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    drives = {(one["arm"], one["connections"]): one for one in document["drives"]}
    assert set(drives) == {("service", 1), ("service", 4), ("service", None), ("plain", 1), ("plain", 4)}
    for name, one in drives.items():
        assert one["answered"] > 0, name
        assert one["errors"] == 0, name
        assert one["peak_bytes"] > 30_000_000, name
        assert one["server_cores"] > 0, name
        assert one["generator_cores"] > 0, name
    assert drives["service", None]["offered_rate"] == pytest.approx(0.7 * drives["service", 4]["throughput"])
    (limit,) = document["engine_limits"]
    assert limit["images_per_second"] > 0
    names = [one["name"] for one in document["ratios"]]
    assert "service / engine limit, images/s at 4 connections" in names
    assert "service / plain, images/s at 4 connections" in names
    page = (tmp_path / "report.md").read_text()
    assert "as asked" in page
    assert str(tmp_path) not in page
    assert "engine limit" in ended.stdout
    assert "4 conn." in ended.stdout


def test_soak_samples_memory_all_along(repository: Path, tmp_path: Path) -> None:
    ended = run(*command(repository, tmp_path, "--soak", "120"))
    assert ended.returncode == 0, ended.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    assert (document["requests"], document["errors"]) == (120, 0)
    assert len(document["samples"]) == 121
    assert document["most_bytes"] >= document["last_bytes"] > 30_000_000
    assert "growth" in ended.stdout


def test_a_server_that_does_not_start_ends_with_its_own_words(repository: Path, tmp_path: Path) -> None:
    ended = run(*command(repository, tmp_path, "--soak", "100", "--service-args", "--device cuda:9"))
    assert ended.returncode == 1
    assert "did not start" in ended.stderr
    assert "device 'cuda:9'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_interrupted_measurement_leaves_no_process_and_writes_what_it_has(repository: Path, tmp_path: Path) -> None:
    long = ["--rounds", "2", "--seconds", "1", "--warmup", "0", "--connections", "1,2,3,4,5,6"]
    process = subprocess.Popen(
        command(repository, tmp_path, *long),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Few batch sizes to try, so that the engine limit is soon there.
        env={**os.environ, "STRIDEVIT_MAX_BATCH": "2"},
        # Where the tests run in the background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (no threads here)
    )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 100
        # The service starts when the engine limit, the first figure, is there.
        while not (tmp_path / "service-0.log").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 130
    assert "stopped" in errors
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["ended_early"] == "interrupted"
    assert len(document["engine_limits"]) == 1
    assert family
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
