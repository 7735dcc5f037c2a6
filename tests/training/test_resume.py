"""A run is never lost: killed, stopped, out of disk, out of luck."""

import dataclasses
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.processes import ROOT
from training import runs
from training.augment import Batch
from training.checkpoints import load_checkpoint
from training.data import Dataset, load_dataset
from training.distributed import World
from training.loop import TrainingError, train
from training.recipes import Recipe, load_recipe
from training.step import Stepper
from training.stopping import Stopped

HERE = World(device=torch.device("cpu"))
QUIET = Console(quiet=True)
EVERYTHING = [
    "val_images=1200",
    "schedule.epochs=4",
    "schedule.accumulate=2",
    "optim.ema_decay=0.9",
    "drop_path=0.1",
    "augment.crop_padding=1",
    "augment.mixup_alpha=0.2",
]
"""A recipe with all that has a state or draws random numbers: 7 steps an epoch, 28 in all."""


def command(out: Path, *more: str) -> list[str]:
    overrides = [word for override in EVERYTHING for word in ("--set", override)]
    arguments = ["train", "--recipe", "digits", "--variant", "csra-r2", "--device", "cpu", "--checkpoint-steps", "3"]
    return [sys.executable, "-m", "training", *arguments, *overrides, "--out", str(out), *more]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def finished(out: Path) -> tuple[dict[str, torch.Tensor], str]:
    return runs.load_final(out)[0].state_dict(), (out / "metrics.csv").read_text()


def assert_equal_runs(one: Path, other: Path) -> None:
    (weights, metrics), (other_weights, other_metrics) = finished(one), finished(other)
    assert metrics == other_metrics
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run(command(out), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    return out


def test_a_killed_run_ends_like_one_that_was_never_stopped(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    resume: list[str] = []
    for kill_after in (0.2, 0.7):
        process = subprocess.Popen(command(out, *resume), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        before = stamp(out)
        while stamp(out) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resume = ["--resume"]
    subprocess.run(command(out, "--resume"), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert_equal_runs(uninterrupted, out)


def stamp(out: Path) -> int:
    return (out / "last.pt").stat().st_mtime_ns if (out / "last.pt").exists() else 0


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_its_very_last_step(
    uninterrupted: Path, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    out = tmp_path / "stopped"
    # Started with SIGINT at its default, whatever this process was started with.
    process = subprocess.Popen(
        command(out, "--checkpoint-steps", "1000"),
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    while stamp(out) == 0 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signum)
    _, printed = process.communicate()
    assert process.returncode == code, printed
    said = re.search(r"stopped at step (\d+) of 28; continue with: .*--resume", printed)
    assert said, printed
    assert load_checkpoint(out)[0]["step"] == int(said[1])
    assert int(said[1]) >= 7
    subprocess.run(command(out, "--resume"), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert_equal_runs(uninterrupted, out)


@pytest.fixture(scope="module")
def few_digits() -> Dataset:
    digits = load_dataset("digits")
    return dataclasses.replace(digits, train=digits.train.take(np.arange(160)), test=digits.test.take(np.arange(50)))


def recipe(*overrides: str) -> Recipe:
    return load_recipe("digits", ["schedule.epochs=3", "schedule.batch_size=16", *overrides])


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


def test_a_signal_is_honoured_after_the_step_and_handlers_are_put_back(
    few_digits: Dataset, tmp_path: Path, at_step: dict[int, object]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    at_step[4] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match=r"stopped at step 6 of 30"):
        train(recipe(), "mha", few_digits, tmp_path / "x", world=HERE, console=QUIET)
    assert signal.getsignal(signal.SIGTERM) is before
    assert load_checkpoint(tmp_path / "x")[0]["step"] == 6


def test_a_signal_in_the_very_last_step_is_honoured_too(
    few_digits: Dataset, tmp_path: Path, at_step: dict[int, object]
) -> None:
    at_step[29] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match=r"stopped at step 30 of 30"):
        train(recipe(), "mha", few_digits, tmp_path / "x", world=HERE, console=QUIET)
    assert not (tmp_path / "x" / "final").exists()
    train(recipe(), "mha", few_digits, tmp_path / "x", world=HERE, resume=True, console=QUIET)
    board = EventAccumulator(str(tmp_path / "x" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train_loss")] == [1, 2, 3]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(few_digits: Dataset, tmp_path: Path) -> None:
    train(recipe(), "mha", few_digits, tmp_path / "whole", world=HERE, console=QUIET)
    out = tmp_path / "x"
    train(recipe(), "mha", few_digits, out, world=HERE, checkpoint_steps=4, console=QUIET)
    last = out / "last.pt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    printed = StringIO()
    train(recipe(), "mha", few_digits, out, world=HERE, resume=True, console=Console(file=printed, width=1000))
    assert re.search(r"last\.pt cannot be read \(wrong checksum.*\): going on from the one before", printed.getvalue())
    assert "at step 28 of 30" in printed.getvalue()
    assert_equal_runs(tmp_path / "whole", out)


def test_without_any_good_checkpoint_a_run_says_so(few_digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(
        runs.RunError, match=r"last\.pt cannot be read .*previous\.pt cannot be read .*start the run ag"
    ):
        train(recipe(), "mha", few_digits, tmp_path, world=HERE, resume=True, console=QUIET)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 200 kB: a checkpoint has 10 MB."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(
    few_digits: Dataset, tmp_path: Path, at_step: dict[int, object]
) -> None:
    train(recipe(), "mha", few_digits, tmp_path / "whole", world=HERE, console=QUIET)
    out, printed = tmp_path / "x", StringIO()
    disk = full_disk()
    at_step[12] = disk.__enter__
    try:
        with pytest.raises(TrainingError, match=r"finished model cannot be written .*File too large.*--resume"):
            train(recipe(), "mha", few_digits, out, world=HERE, console=Console(file=printed, width=1000))
    finally:
        disk.__exit__(None, None, None)
    assert printed.getvalue().count("no checkpoint of step") == 2
    assert "File too large" in printed.getvalue()
    assert sorted(path.name for path in out.glob("*.pt")) == ["last.pt"]
    assert load_checkpoint(out)[0]["step"] == 10
    train(recipe(), "mha", few_digits, out, world=HERE, resume=True, console=QUIET)
    assert_equal_runs(tmp_path / "whole", out)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run_and_keeps_the_last_good(
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
        train(recipe(), "mha", few_digits, out, world=HERE, console=QUIET)
    state = load_checkpoint(out)[0]
    assert state["step"] == 10
    assert all(tensor.isfinite().all() for tensor in state["stepper"]["model"].values())


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "last.pt"
    target.write_text("old")

    def write_half(path: Path) -> None:
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        runs.write_atomically(target, write_half)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
