"""Several processes train what one would have trained."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from typer.testing import CliRunner

from loadtests.experiment.server import free_port
from tests.processes import ROOT
from training.__main__ import app
from training.data import Dataset, load_dataset
from training.distributed import PeerLost, World, join
from training.loop import Execution, TrainingError, train
from training.recipes import load_recipe
from training.runs import RunError, load_final, read_metrics

CPU = torch.device("cpu")


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


@dataclass(frozen=True, kw_only=True)
class Beside(World):
    """The main process, and another one that gives `other(value)` where this one gives `value`."""

    other: Callable[[Any], Any]

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other(value)]


@pytest.fixture(scope="module")
def few_digits() -> Dataset:
    digits = load_dataset("digits")
    return replace(digits, train=digits.train.take(np.arange(160)), test=digits.test.take(np.arange(50)))


def test_processes_that_were_started_differently_are_refused(few_digits: Dataset, tmp_path: Path) -> None:
    def other(settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "data_fingerprint": "another", "test": False}

    on = Execution(world=Beside(device=CPU, other=other), console=Console(quiet=True))
    with pytest.raises(TrainingError, match=r"process 1 has another data_fingerprint, test than process 0: start all"):
        train(load_recipe("digits"), "mha", few_digits, tmp_path / "x", on)
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_that_only_another_machine_has_is_not_ignored(few_digits: Dataset, tmp_path: Path) -> None:
    def other(value: Any) -> Any:
        return True if value is False else value

    on = Execution(world=Beside(device=CPU, other=other), console=Console(quiet=True))
    with pytest.raises(RunError, match=r"process 1 has a checkpoint in .*, but process 0.* that all machines share"):
        train(load_recipe("digits"), "mha", few_digits, tmp_path / "x", on, resume="auto")


def test_a_lost_process_is_an_error_that_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {**alone, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    closed = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [192.0.2.2]:3123"
    try:
        with (
            pytest.raises(PeerLost, match=r"lost \(Connection closed by peer \[192.0.2.2\]:3123\).*--auto-resume"),
            join(CPU),
        ):
            raise RuntimeError(closed)
    finally:
        dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="shape"), join(CPU):
        raise RuntimeError("shape mismatch")
    dist.destroy_process_group()
