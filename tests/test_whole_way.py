"""From training to an answer over HTTP, by the commands that a user types."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.processes import ROOT, serving

STRIDEVIT = Path(sys.executable).with_name("stridevit")


def run(*arguments: str, cwd: Path) -> None:
    # One thread: two would wait for each other on a shared machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([STRIDEVIT, *arguments], cwd=cwd, check=True, env=environment)


@pytest.mark.slow
def test_model_is_trained_exported_served_and_accurate(tmp_path: Path) -> None:
    """In the folder of another project, whose modules have the same names as our packages."""
    (tmp_path / "service.py").write_text("raise SystemExit('the wrong service')\n")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("raise SystemExit('the wrong training')\n")
    quick = ["--set", "schedule.epochs=4", "--set", "optim.lr=2e-3"]
    run("train", "--recipe", "digits", "--variant", "lsra-r2", "--out", "run", *quick, cwd=tmp_path)
    run("export", "run", "run", "--repository", "models", cwd=tmp_path)
    run("images", "--dataset", "digits", "--out", "images", "--count", "100", cwd=tmp_path)
    with (tmp_path / "images" / "labels.csv").open() as stream:
        labels = {row["file"]: int(row["index"]) for row in csv.DictReader(stream)}
    command = [str(STRIDEVIT), "serve"]
    environment = {"PYTHONPATH": str(ROOT)}
    with (
        serving(Path("models"), command=command, cwd=tmp_path, environment=environment) as (url, _),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        (model,) = client.get("/v1/models").json()["models"]
        right = 0
        for file, label in labels.items():
            answer = client.post("/v1/classify?model=digits-lsra-r2", content=(tmp_path / "images" / file).read_bytes())
            right += answer.json()["results"][0]["predictions"][0]["index"] == label
    # Four epochs reach about 95 %; a model that is served wrongly reaches 10 %.
    assert right >= 80
    assert abs(right / 100 - model["accuracy"]["top1"]) < 0.1
