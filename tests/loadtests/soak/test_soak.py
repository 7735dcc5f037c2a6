"""Memory over many requests: what is sent, what is compared, and a short run."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.soak.soak import LONGER_SIDES, Soak, mixed_sizes


def test_the_first_tenth_of_the_requests_is_compared_with_the_last() -> None:
    samples = [(0, 50), (5, 100), (10, 102), (50, 300), (90, 1), (95, 103), (98, 105), (100, 104)]
    soak = Soak(model="m", planned_requests=100, samples=samples, command="", environment={})
    figures = soak.figures()
    assert figures.pop("growth") == pytest.approx(3 / 101)
    assert figures == {"idle_bytes": 50, "first_bytes": 101, "last_bytes": 104, "peak_bytes": 300}


def test_an_interrupted_run_is_reported_if_it_has_enough_samples() -> None:
    soak = Soak(model="m", planned_requests=1000, samples=[(number, 1) for number in range(49)])
    assert not soak.measured
    soak.samples.append((50, 1))
    assert soak.measured


def test_each_image_is_sent_in_several_sizes() -> None:
    images, what = mixed_sizes(None)
    assert len(set(images)) == 8 * len(LONGER_SIDES)
    assert max(map(len, images)) > 50 * min(map(len, images))
    assert "48 JPEGs" in what


def test_soak_samples_memory_all_along(repository: Path, tmp_path: Path) -> None:
    asked = ["--model", "digits-csra-r2", "--repository", str(repository), "--out", str(tmp_path), "--requests", "120"]
    ended = CliRunner().invoke(app, ["soak", *asked])
    assert ended.exit_code == 0, ended.output
    document = json.loads((tmp_path / "results.json").read_text())
    assert (document["requests"], document["failed_requests"]) == (120, 0)
    assert [number for number, _ in document["samples"]] == list(range(121))
    assert document["peak_bytes"] >= document["last_bytes"] > 30_000_000
    assert "growth" in ended.stdout
    assert "| fresh process |" in (tmp_path / "report.md").read_text()


def test_a_service_that_does_not_start_ends_with_its_own_words(repository: Path, tmp_path: Path) -> None:
    asked = ["--model", "digits-csra-r2", "--repository", str(repository), "--out", str(tmp_path)]
    ended = CliRunner().invoke(app, ["soak", *asked, "--service-args", "--device cuda:9"])
    assert ended.exit_code == 1
    assert "did not start" in ended.output
    assert "device 'cuda:9'" in ended.output
    assert not (tmp_path / "report.md").exists()
