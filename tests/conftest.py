"""Fixtures that several packages' tests share: real data, and one small trained model per session."""

import hashlib
import os
import shutil
import signal
from importlib.metadata import version
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

# An example may take a long time on a busy machine; every run uses the same examples.
settings.register_profile("stridevit", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("stridevit")

# torch is imported where it is needed: most tests of the service and the load tests do without it.


def pytest_configure() -> None:
    """Ctrl-C works in tests and in what they start, also where a shell started pytest in the background without it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def one_torch_thread() -> None:
    """The tests' tensors are small: more threads only wait for each other, most of all on a shared machine."""
    import torch

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
def digits_run(shared_folder: Path, pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Path:
    """A C-SRA model with real weights, trained on digits for two epochs by the first worker that needs it.

    Shared: copy it before you change it. pytest's cache keeps it for later runs, as long as `training/` is the same.
    """
    out = shared_folder / "runs" / "digits-csra-r2"
    with FileLock(shared_folder / "runs.lock"):
        if not out.is_dir():
            assert pytestconfig.cache is not None
            kept = pytestconfig.cache.mkdir("digits") / _training_digest()
            if not kept.is_dir():
                request.getfixturevalue("one_torch_thread")
                _train_digits(kept)
            shutil.copytree(kept, out)
    return out


def _training_digest() -> str:
    """Changes with the code of `training` and with the version of torch."""
    digest = hashlib.sha256(version("torch").encode())
    package = Path(__file__).parents[1] / "training"
    for file in sorted(path for path in package.rglob("*") if path.suffix in {".py", ".toml"}):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _train_digits(out: Path) -> None:
    import torch
    from rich.console import Console

    from training.data import load_dataset
    from training.distributed import World
    from training.loop import Execution, train
    from training.recipes import load_recipe

    recipe = load_recipe("digits", ["schedule.epochs=2", "optim.lr=2e-3", "schedule.warmup_epochs=0.5"])
    execution = Execution(world=World(device=torch.device("cpu")), console=Console(quiet=True))
    unfinished = out.with_name(f"{out.name}-{os.getpid()}") / "digits-csra-r2"
    train(recipe, "csra-r2", load_dataset("digits"), unfinished, execution)
    if not out.is_dir():
        unfinished.rename(out)


@pytest.fixture(scope="session")
def repository(digits_run: Path, shared_folder: Path, request: pytest.FixtureRequest) -> Path:
    """A repository that holds `digits-csra-r2`, version 1. Shared: copy it before you change it."""
    folder = shared_folder / "repository"
    with FileLock(shared_folder / "repository.lock"):
        if not folder.is_dir():
            request.getfixturevalue("one_torch_thread")
            from export.publish import export
            from export.sources import finished_run

            export(finished_run(digits_run, None), folder)
    return folder
