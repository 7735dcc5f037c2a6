"""Two machines train one model: namespaces with an address each, and the run's folder as the one that they share."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.namespaces import INTERFACE, Machine, two_machines
from tests.processes import PATIENCE_SECONDS, ROOT
from tests.training.test_resume import EVERYTHING, assert_equal_runs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3 * PATIENCE_SECONDS)]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

LOST_AT_STEP = """
import os, signal, sys
from training import __main__, step
number, take = int(sys.argv.pop(1)), step.Stepper.__call__

def take_or_die(self, step, *arguments, **options):
    if step == number:
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self, step, *arguments, **options)

step.Stepper.__call__ = take_or_die
__main__.app()
"""
"""Trains like `-m training`, until a step before which it and its torchrun end, as if their machine crashed."""


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    with two_machines() as both:
        yield both


@pytest.fixture(scope="module")
def command(small_data: list[str]) -> list[str]:
    """Trains EVERYTHING, 24 steps; needs --out."""
    overrides = [word for override in EVERYTHING for word in ("--set", override)]
    return ["train", *small_data, "--variant", "csra-r2", "--checkpoint-steps", "3", "--auto-resume", *overrides]


@contextmanager
def torchrun(
    machine: Machine, host: Machine, words: list[str], *, lost_at_step: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start this machine's part of the training as docs/training.md says; the rendezvous is at `host`."""
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2"]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host.address}:29500", "--rdzv-id", "run"]
    options += ["--rdzv-conf", f"is_host={int(machine is host)}", "--local-addr", machine.address]
    program = ["-m", "training"]
    if lost_at_step is not None:
        program = ["--no-python", sys.executable, "-c", LOST_AT_STEP, str(lost_at_step)]
    process = subprocess.Popen(
        machine.command(sys.executable, "-m", "torch.distributed.run", *options, *program, *words),
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        machine.kill()
        process.communicate()


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """Wait until all have ended well: what they said on standard error."""
    said = [process.communicate(timeout=PATIENCE_SECONDS)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


def train_on_both(machines: tuple[Machine, Machine], words: list[str]) -> list[str]:
    with ExitStack() as stack:
        return finish(*(stack.enter_context(torchrun(machine, machines[0], words)) for machine in machines))


@pytest.fixture(scope="module")
def undisturbed(
    command: list[str], machines: tuple[Machine, Machine], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_on_both(machines, [*command, "--out", str(out)])
    return out


def test_a_machine_that_dies_and_comes_back_changes_no_bit(
    command: list[str], machines: tuple[Machine, Machine], undisturbed: Path, tmp_path: Path
) -> None:
    """The other machine's torchrun starts its process again, as soon as the lost machine is back."""
    first, second = machines
    words = [*command, "--out", str(tmp_path / "x")]
    with torchrun(first, first, words) as survivor:
        with torchrun(second, first, words, lost_at_step=10) as lost:
            assert lost.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        with torchrun(second, first, words) as back:
            said, _ = finish(survivor, back)
    assert "error of process 0: the connection to another process was lost" in said
    assert "at step 9 of 24" in said
    assert_equal_runs(undisturbed, tmp_path / "x")


def test_without_the_machine_of_the_rendezvous_the_others_end_and_all_start_again(
    command: list[str], machines: tuple[Machine, Machine], undisturbed: Path, tmp_path: Path
) -> None:
    first, second = machines
    words = [*command, "--out", str(tmp_path / "x")]
    with (
        torchrun(first, first, words, lost_at_step=10) as lost,
        torchrun(second, first, words) as other,
    ):
        _, said = other.communicate(timeout=PATIENCE_SECONDS)
        assert other.returncode == 1
        assert "error of process 1: the connection to another process was lost" in said
        assert lost.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    assert "at step 9 of 24" in train_on_both(machines, words)[0]
    assert_equal_runs(undisturbed, tmp_path / "x")
