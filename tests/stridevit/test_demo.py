"""`stridevit demo`, on pictures of one's own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.bundle import read_bundle

DEMO = [sys.executable, "-m", "stridevit", "demo"]


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    result = subprocess.run([*DEMO, "--data", str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "is not a folder" in " ".join(result.stderr.replace("│", "").split())


def test_a_step_that_fails_ends_the_demo(tmp_path: Path) -> None:
    command = [*DEMO, "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--variants", "mha"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "$ stridevit train --data" in result.stderr
    assert "stridevit export" not in result.stderr


def test_finished_runs_and_models_are_kept(tmp_path: Path) -> None:
    (tmp_path / "Photos").mkdir()
    for variant in ("mha", "csra-r2"):
        final = tmp_path / "demo" / "runs" / f"photos-{variant}" / "final"
        final.mkdir(parents=True)
        (final / "model.json").touch()
        (tmp_path / "demo" / "models" / f"photos-{variant}").mkdir(parents=True)
    options = ["--data", str(tmp_path / "Photos"), "--out", str(tmp_path / "demo"), "--variants", "mha,csra-r2"]
    result = subprocess.run([*DEMO, *options], capture_output=True, text=True, check=False)
    assert "$ stridevit compare" in result.stderr
    assert "stridevit train" not in result.stderr
    assert "stridevit export" not in result.stderr
    assert result.returncode != 0, "there are no models in these folders"


@pytest.mark.long
@pytest.mark.timeout(1800)  # its load test alone takes minutes
def test_the_whole_way_on_own_pictures(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for number, name in enumerate(("red", "green", "blue")):
        (tmp_path / "Photos" / name).mkdir(parents=True)
        for row in range(10):
            pixels = draw.integers(0, 60, size=(32, 32, 3), dtype=np.uint8)
            pixels[..., number] += 150
            Image.fromarray(pixels).save(tmp_path / "Photos" / name / f"{row}.png")
    options = ["--data", str(tmp_path / "Photos"), "--out", str(tmp_path / "demo"), "--variants", "mha,csra-r2"]
    result = subprocess.run([*DEMO, *options, "--epochs", "8"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "demo" / "report.html").is_file()
    manifest = read_bundle(tmp_path / "demo" / "models" / "photos-csra-r2" / "1").manifest
    assert manifest.accuracy is not None
    assert manifest.accuracy.n == 3
