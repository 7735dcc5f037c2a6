"""The report's arithmetic, against samples with known answers."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from loadtests.compare import Block, Comparison, Plan, within
from loadtests.report import percentile, rows, write_html, write_json

INFO = {"variant": "mha", "tokens": 64, "kv_tokens": 64, "accuracy": None}


def block(model: str, throughput: float, latencies: list[float], peak: int, errors: int = 0) -> Block:
    return Block(
        model=model,
        throughput=throughput,
        latencies_ms=np.array(latencies),
        errors=errors,
        idle_bytes=100_000_000,
        peak_bytes=peak,
        info={**INFO, "accuracy": {"dataset": "d", "split": "test", "n": 7, "top1": 0.5}} if model == "a" else INFO,
    )


@pytest.fixture
def comparison() -> Comparison:
    hundred = [float(number) for number in range(1, 101)]
    return Comparison(
        plan=Plan(
            repository=Path("models"),
            models=("a", "b"),
            data=None,
            users=2,
            seconds=1,
            warmup_seconds=0,
            rounds=3,
        ),
        payloads="<none>",
        blocks=[
            block("a", 10, hundred, 150_000_000),
            block("b", 5, [1.0, 2.0, 3.0], 130_000_000, errors=4),
            block("a", 30, hundred, 170_000_000),
            block("a", 20, [], 160_000_000, errors=1),
        ],
        environment={"cpu": "test"},
        finished=datetime(2026, 1, 1, tzinfo=UTC),
    )


def test_blocks_turn_round_so_that_drift_hits_all_models_alike(comparison: Comparison) -> None:
    assert comparison.plan.order() == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_rows_take_medians_pools_and_maxima(comparison: Comparison) -> None:
    a, b = rows(comparison)
    assert (a.throughput, a.throughput_range, a.errors, a.answered) == (20, (10, 30), 1, 200)
    assert a.p50_ms == pytest.approx(50.5)
    assert a.peak_bytes == 170_000_000
    assert (a.top1, b.top1) == (0.5, None)
    assert (b.p50_ms, b.p95_ms, b.errors) == (None, None, 4)


def test_a_slow_server_s_throughput_and_slowest_answers_are_not_cut_off() -> None:
    # A closed loop of 16 users at exactly one second an answer: 16 images a second, whatever the window.
    starts = np.concatenate([np.arange(12) + user / 16 for user in range(16)])
    latencies = np.full(len(starts), 1000.0)
    ok = np.ones(len(starts), dtype=bool)
    throughput, measured = within(starts, latencies, ok, begin=2.5, seconds=5)
    assert throughput == 16
    assert measured.sum() == 80
    throughput, measured = within(starts, latencies, ~ok, begin=2.5, seconds=5)
    assert (throughput, measured.sum()) == (0, 80)


@pytest.mark.parametrize(
    ("count", "rank", "shown"), [(9, 50, False), (10, 50, True), (499, 99, False), (500, 99, True)]
)
def test_a_percentile_needs_five_samples_beyond_it(count: int, rank: float, shown: bool) -> None:
    assert (percentile(np.arange(float(count)), rank) is not None) is shown


def test_page_and_json_hold_the_figures(comparison: Comparison, tmp_path: Path) -> None:
    write_html(comparison, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "20.0 (10.0–30.0)" in page
    assert "&lt;none&gt;" in page, "text from outside must be escaped"
    assert "http://" not in page.split("</style>")[1].replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    write_json(comparison, tmp_path / "results.json")
    document = json.loads((tmp_path / "results.json").read_text())
    assert [row["throughput"] for row in document["rows"]] == [20, 5]
    with np.load(tmp_path / "samples.npz") as samples:
        assert len(samples["0-a"]) == 100
