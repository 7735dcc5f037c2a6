"""The whole way through, by the commands a user types: train, export, serve over a socket, classify."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import httpx

from tests.processes import ROOT, serving


def run(*arguments: str) -> None:
    # One thread: two would wait for each other on a machine that is shared.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True, env=environment)


def test_a_model_is_trained_exported_served_and_right(tmp_path: Path) -> None:
    out, repository, images = (str(tmp_path / name) for name in ("run", "models", "images"))
    quick = ["--set", "schedule.epochs=4", "--set", "optim.lr=2e-3"]
    run("training", "train", "--recipe", "digits", "--variant", "lsra-r2", "--out", out, *quick)
    run("export", "run", out, "--repository", repository)
    run("training", "images", "--dataset", "digits", "--out", images, "--count", "100")
    with (Path(images) / "labels.csv").open() as stream:
        labels = {row["file"]: int(row["index"]) for row in csv.DictReader(stream)}
    with serving(Path(repository)) as (url, _), httpx.Client(base_url=url) as client:
        (model,) = client.get("/v1/models").json()["models"]
        right = 0
        for file, label in labels.items():
            answer = client.post("/v1/classify?model=digits-lsra-r2", content=(Path(images) / file).read_bytes())
            right += answer.json()["results"][0]["predictions"][0]["index"] == label
    # Four epochs reach about 95 %; a model that is served wrongly reaches 10 %.
    assert right >= 80
    assert abs(right / 100 - model["accuracy"]["top1"]) < 0.1
