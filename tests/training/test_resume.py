"""Resuming: after signals, kills, damaged checkpoints and full disks."""

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from tests.processes import ROOT
from training import runs
from training.__main__ import app
from training.augment import Batch
from training.checkpoints import load_checkpoint
from training.data import Dataset, load_dataset
from training.distributed import World
from training.loop import Execution, TrainingError, train
from training.recipes import Recipe, load_recipe
from training.step import Stepper
from training.stopping import Stopped

ON = Execution(world=World(device=torch.device("cpu")), console=Console(quiet=True))
EVERYTHING = [
    "schedule.epochs=3",
    "schedule.accumulate=2",
    "optim.ema_decay=0.9",
    "drop_path=0.1",
    "augment.crop_padding=1",
    "augment.mixup_alpha=0.2",
    "augment.cutmix_alpha=1",
]
"""Everything that has a state or draws random numbers: 8 steps per epoch, 24 in all."""


@pytest.fixture(scope="module")
def command(small_data: list[str]) -> list[str]:
    """Trains EVERYTHING; needs --out."""
    overrides = [word for override in EVERYTHING for word in ("--set", override)]
    return ["train", *small_data, "--variant", "csra-r2", "--checkpoint-steps", "3", *overrides]


def finished(out: Path) -> tuple[dict[str, torch.Tensor], str]:
    return runs.load_final(out)[0].state_dict(), (out / "metrics.csv").read_text()


def assert_equal_runs(one: Path, other: Path) -> None:
    (weights, metrics), (other_weights, other_metrics) = finished(one), finished(other)
    assert metrics == other_metrics
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.fixture(scope="module")
def uninterrupted(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    result = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, object]]:
    """Functions to call before a step is taken, by its number."""
    calls: dict[int, object] = {}
    take = Stepper.__call__

    def watched(self: Stepper, step: int, batches: Iterator[Batch], *, stop: bool = False) -> tuple[float, bool]:
        if callable(call := calls.pop(step, None)):
            call()
        return take(self, step, batches, stop=stop)

    monkeypatch.setattr(Stepper, "__call__", watched)
    yield calls
    assert not calls, "a step was never reached"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_run_saves_its_last_step_and_resumes_to_the_same_bits(
    command: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    at_step: dict[int, object],
    signum: signal.Signals,
    code: int,
) -> None:
    out = tmp_path / "stopped"
    at_step[9] = lambda: os.kill(os.getpid(), signum)
    # SIGINT at its default, whatever this process was started with.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stopped = CliRunner().invoke(app, [*command, "--out", str(out)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.exit_code == code
    assert re.search(r"stopped at step 11 of 24; continue with: .*--resume", stopped.stderr)
    assert load_checkpoint(out)[0]["step"] == 11
    assert CliRunner().invoke(app, [*command, "--out", str(out), "--resume"]).exit_code == 0
    assert_equal_runs(uninterrupted, out)


KILLED_AT_STEP = """
import os, signal, sys
from training import __main__, step
number, take = int(sys.argv.pop(1)), step.Stepper.__call__

def take_or_die(self, step, *arguments, **options):
    if step == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self, step, *arguments, **options)

step.Stepper.__call__ = take_or_die
__main__.app()
"""


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(command: list[str], uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number, resume in ((10, []), (20, ["--resume"])):
        words = [sys.executable, "-c", KILLED_AT_STEP, str(number), *command, "--out", str(out), *resume]
        killed = subprocess.run(words, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert CliRunner().invoke(app, [*command, "--out", str(out), "--resume"]).exit_code == 0
    assert_equal_runs(uninterrupted, out)


@pytest.fixture(scope="module")
def few_digits() -> Dataset:
    digits = load_dataset("digits")
    return replace(digits, train=digits.train.take(np.arange(160)), test=digits.test.take(np.arange(50)))


def recipe(*overrides: str) -> Recipe:
    return load_recipe("digits", ["schedule.epochs=3", "schedule.batch_size=16", *overrides])


@pytest.fixture(scope="module")
def whole(few_digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `recipe()` that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(recipe(), "mha", few_digits, out, ON)
    return out


def test_signal_is_honoured_after_the_step_and_handlers_are_restored(
    few_digits: Dataset, tmp_path: Path, at_step: dict[int, object]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    at_step[4] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match=r"stopped at step 6 of 30"):
        train(recipe(), "mha", few_digits, tmp_path / "x", ON)
    assert signal.getsignal(signal.SIGTERM) is before
    assert load_checkpoint(tmp_path / "x")[0]["step"] == 6


def test_signal_in_the_last_step_is_honoured(few_digits: Dataset, tmp_path: Path, at_step: dict[int, object]) -> None:
    at_step[29] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match=r"stopped at step 30 of 30"):
        train(recipe(), "mha", few_digits, tmp_path / "x", ON)
    assert not (tmp_path / "x" / "final").exists()
    train(recipe(), "mha", few_digits, tmp_path / "x", ON, resume=True)
    board = EventAccumulator(str(tmp_path / "x" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train_loss")] == [1, 2, 3]


def test_auto_resume_begins_continues_and_repeats_a_finished_run(
    few_digits: Dataset, whole: Path, tmp_path: Path, at_step: dict[int, object]
) -> None:
    out = tmp_path / "x"
    at_step[4] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        train(recipe(), "mha", few_digits, out, ON, resume="auto")
    for _ in range(2):
        train(recipe(), "mha", few_digits, out, ON, resume="auto")
        assert_equal_runs(whole, out)


def test_damaged_checkpoint_gives_way_to_the_one_before(few_digits: Dataset, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    train(recipe(), "mha", few_digits, out, replace(ON, checkpoint_steps=4))
    last = out / "last.pt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    printed = StringIO()
    train(recipe(), "mha", few_digits, out, replace(ON, console=Console(file=printed, width=1000)), resume=True)
    assert re.search(
        r"last\.pt cannot be read \(wrong checksum.*\): continuing from the one before", printed.getvalue()
    )
    assert "at step 28 of 30" in printed.getvalue()
    assert_equal_runs(whole, out)


def test_resuming_without_a_good_checkpoint_is_an_error(few_digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(
        runs.RunError, match=r"last\.pt cannot be read .*previous\.pt cannot be read .*start the run ag"
    ):
        train(recipe(), "mha", few_digits, tmp_path, ON, resume=True)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 200 kB: a checkpoint has 10 MB."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_full_disk_costs_a_checkpoint_but_not_the_run(
    few_digits: Dataset, whole: Path, tmp_path: Path, at_step: dict[int, object]
) -> None:
    out, printed = tmp_path / "x", StringIO()
    disk = full_disk()
    at_step[12] = disk.__enter__
    try:
        with pytest.raises(TrainingError, match=r"finished model cannot be written .*File too large.*--resume"):
            train(recipe(), "mha", few_digits, out, replace(ON, console=Console(file=printed, width=1000)))
    finally:
        disk.__exit__(None, None, None)
    assert printed.getvalue().count("no checkpoint of step") == 2
    assert "File too large" in printed.getvalue()
    assert sorted(path.name for path in out.glob("*.pt")) == ["last.pt"]
    assert load_checkpoint(out)[0]["step"] == 10
    train(recipe(), "mha", few_digits, out, ON, resume=True)
    assert_equal_runs(whole, out)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_step_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    few_digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: dict[int, object], what: str
) -> None:
    cross_entropy = torch.nn.functional.cross_entropy

    def broken(logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float) -> torch.Tensor:
        loss = cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if what == "loss":
            return loss * float("nan")
        logits.register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[no-untyped-call]
        return loss

    at_step[12] = lambda: monkeypatch.setattr("torch.nn.functional.cross_entropy", broken)
    out = tmp_path / "x"
    with pytest.raises(TrainingError, match=r"at step 13 \(epoch 2\): start again with a lower optim\.lr; .*last\.pt"):
        train(recipe(), "mha", few_digits, out, ON)
    state = load_checkpoint(out)[0]
    assert state["step"] == 10
    assert all(tensor.isfinite().all() for tensor in state["stepper"]["model"].values())


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "last.pt"
    target.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        runs.write_atomically(target, b"new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
