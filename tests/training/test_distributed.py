"""Several processes train what one would have trained."""

import base64
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.processes import ROOT
from training.runs import load_final, read_metrics

OPTIONS = ["--recipe", "digits", "--variant", "csra-r2", "--device", "cpu"]
OVERRIDES = ["schedule.epochs=2", "val_images=200", "augment.crop_padding=1", "schedule.accumulate=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def train(launcher: list[str], out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    overrides = [word for override in OVERRIDES for word in ("--set", override)]
    arguments = [*launcher, "-m", "training", "train", *OPTIONS, *overrides, "--out", str(out), *more]
    return subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, check=False, capture_output=True, text=True)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_two_gloo_processes_follow_the_loss_curve_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for launcher, out in (([sys.executable], one), (TORCHRUN, two)):
        result = train(launcher, out)
        assert result.returncode == 0, result.stderr
    for alone, together in zip(read_metrics(one / "metrics.csv"), read_metrics(two / "metrics.csv"), strict=True):
        assert alone["lr"] == together["lr"]
        assert alone["train_loss"] == pytest.approx(together["train_loss"], abs=2e-4)
        assert alone["val_loss"] == pytest.approx(together["val_loss"], abs=2e-3)
    accuracies = [load_final(out)[1].accuracy for out in (one, two)]
    assert accuracies[0]
    assert accuracies[1]
    assert accuracies[0].n == accuracies[1].n == 360
    assert abs(accuracies[0].top1 - accuracies[1].top1) <= 2 / 360
    one_correct, two_correct = accuracies[0].correct, accuracies[1].correct
    assert one_correct
    assert two_correct
    bits = np.unpackbits(np.frombuffer(base64.b64decode(two_correct.top1), dtype=np.uint8))
    assert bits.sum() == round(360 * accuracies[1].top1)
    assert one_correct.labels_sha256 == two_correct.labels_sha256


def test_an_error_of_the_main_process_ends_all(tmp_path: Path) -> None:
    result = train(TORCHRUN, tmp_path / "x", "--resume")
    assert result.returncode != 0
    assert "error of process 0: " in result.stderr
    assert "start it without --resume" in result.stderr
