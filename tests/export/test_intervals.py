"""Intervals of ratios: known answers, coverage, and too few rounds."""

import json

import numpy as np
import pytest

from export.intervals import Interval, paired_ratio
from tests.processes import ROOT


def test_interval_is_the_paired_student_t_of_the_logarithms() -> None:
    logs = np.array([0.1, 0.2, 0.3, 0.2, 0.2])
    found = paired_ratio(2 * np.exp(logs), np.full(5, 2.0))
    # Mean 0.2, standard error 0.0707 / √5, t(0.975, 4) = 2.776445.
    half = 2.776445 * np.sqrt(0.005) / np.sqrt(5)
    assert found.ratio == pytest.approx(np.exp(0.2))
    assert found.low == pytest.approx(np.exp(0.2 - half), rel=1e-6)
    assert found.high == pytest.approx(np.exp(0.2 + half), rel=1e-6)


def test_interval_covers_95_percent() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        base = generator.lognormal(0, 0.5, size=6)
        found = paired_ratio(1.1 * base * generator.lognormal(0, 0.05, size=6), base)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 1.1 <= found.high
    assert 0.935 <= covered / 2000 <= 0.965


def test_no_interval_without_enough_rounds_or_any_difference() -> None:
    assert paired_ratio(np.array([1.0, 2.0, 1.0, 2.0]), np.ones(4)).low is None
    assert paired_ratio(np.ones(6), np.ones(6)) == Interval(ratio=1.0, low=None, high=None)
    assert str(Interval(ratio=1.234, low=None, high=None)) == "×1.23"
    assert str(Interval(ratio=1.234, low=1.1, high=1.4)) == "×1.23 (1.10–1.40)"


@pytest.mark.parametrize("report", sorted(path.parent.name for path in ROOT.glob("docs/engine/*/profile.json")))
def test_published_intervals_follow_from_their_rounds(report: str) -> None:
    folder = ROOT / "docs" / "engine" / report
    record, text = json.loads((folder / "profile.json").read_text()), (folder / "profile.md").read_text()
    first = record["arms"][0]["label"]
    baselines = {cell["batch"]: np.array(cell["rates"]) for cell in record["cells"] if cell["arm"] == first}
    for cell in record["cells"]:
        expected = paired_ratio(np.array(cell["rates"]), baselines[cell["batch"]])
        assert cell["ratio"]["ratio"] == pytest.approx(expected.ratio, rel=1e-3)
        for stated, found in ((cell["ratio"]["low"], expected.low), (cell["ratio"]["high"], expected.high)):
            assert stated == (found if found is None else pytest.approx(found, rel=1e-3))
        printed = "1" if cell["arm"] == first else str(Interval(**cell["ratio"]))
        row = next(line for line in text.splitlines() if line.startswith(f"| {cell['batch']} | {cell['arm']} |"))
        assert f" {printed} " in row
