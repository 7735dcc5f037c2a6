"""Fixtures that several packages' tests share: real data, and one small trained model per session."""

import os
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from rich.console import Console

from export.publish import export
from export.sources import finished_run
from training.data import load_dataset
from training.distributed import World
from training.loop import Execution, train
from training.recipes import load_recipe


def pytest_configure() -> None:
    """Ctrl-C works in tests and in what they start, also where a shell started pytest in the background without it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """The tests' tensors are small: more threads only wait for each other, most of all on a shared machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data that STRIDEVIT_DATA names; skips the test if unset, fails it if wrong."""
    named = os.environ.get("STRIDEVIT_DATA")
    if not named:
        pytest.skip("needs real data: set STRIDEVIT_DATA to the folder that holds cifar100/, photos/ and odd/")
    folder = Path(named)
    missing = [name for name in ("cifar100", "photos", "odd") if not (folder / name).is_dir()]
    assert not missing, f"STRIDEVIT_DATA={named} has no {', '.join(missing)}"
    return folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of pytest-xdist, which each have a temporary folder inside it."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def digits_run(shared_folder: Path) -> Path:
    """A C-SRA model with real weights, trained on digits for two epochs by the first worker that needs it.

    Shared: copy it before you change it.
    """
    out = shared_folder / "runs" / "digits-csra-r2"
    with FileLock(shared_folder / "runs.lock"):
        if not out.is_dir():
            recipe = load_recipe("digits", ["schedule.epochs=2", "optim.lr=2e-3", "schedule.warmup_epochs=0.5"])
            execution = Execution(world=World(device=torch.device("cpu")), console=Console(quiet=True))
            train(recipe, "csra-r2", load_dataset("digits"), out, execution)
    return out


@pytest.fixture(scope="session")
def repository(digits_run: Path, shared_folder: Path) -> Path:
    """A repository that holds `digits-csra-r2`, version 1. Shared: copy it before you change it."""
    folder = shared_folder / "repository"
    with FileLock(shared_folder / "repository.lock"):
        if not folder.is_dir():
            export(finished_run(digits_run, None), folder)
    return folder
