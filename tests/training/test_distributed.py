"""Several processes train what one would have trained."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.processes import ROOT
from training.__main__ import app
from training.runs import load_final, read_metrics


@pytest.fixture(scope="module")
def command(small_data: list[str]) -> list[str]:
    """Trains with micro-batches; needs --out."""
    overrides = ["schedule.epochs=2", "augment.crop_padding=1", "schedule.accumulate=2"]
    options = [word for override in overrides for word in ("--set", override)]
    return ["train", *small_data, "--variant", "csra-r2", *options]


def torchrun(words: list[str]) -> subprocess.CompletedProcess[str]:
    two = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *two, "-m", "training", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)


def test_two_gloo_processes_follow_the_loss_curve_of_one(command: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = CliRunner().invoke(app, [*command, "--out", str(one)])
    assert alone.exit_code == 0, alone.output
    together = torchrun([*command, "--out", str(two)])
    assert together.returncode == 0, together.stderr
    for row, other in zip(read_metrics(one / "metrics.csv"), read_metrics(two / "metrics.csv"), strict=True):
        assert row["lr"] == other["lr"]
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=2e-4)
        assert row["val_loss"] == pytest.approx(other["val_loss"], abs=2e-3)
    accuracies = [load_final(out)[1].accuracy for out in (one, two)]
    assert accuracies[0]
    assert accuracies[1]
    assert accuracies[0].n == accuracies[1].n == 50
    assert abs(accuracies[0].top1 - accuracies[1].top1) <= 2 / 50
    # Each process evaluated its share: together, in the order of the split, they say what one process finds.
    card = (two / "final" / "model.json").read_bytes()
    data = command[command.index("--data") + 1]
    assert CliRunner().invoke(app, ["evaluate", str(two), "--data", data, "--record"]).exit_code == 0
    assert (two / "final" / "model.json").read_bytes() == card


@pytest.mark.slow
def test_error_of_the_main_process_ends_all_processes(command: list[str], tmp_path: Path) -> None:
    result = torchrun([*command, "--out", str(tmp_path / "x"), "--resume"])
    assert result.returncode != 0
    assert "error of process 0: " in result.stderr
    assert "start it without --resume" in result.stderr
