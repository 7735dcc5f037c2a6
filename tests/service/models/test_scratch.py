"""A load's temporary folder goes with it, or with the next load if its process was killed."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.models.scratch import scratch_folder
from tests.processes import ROOT


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    monkeypatch.setattr(tempfile, "tempdir", None)


def folders(parent: Path) -> list[Path]:
    return sorted(parent.glob("stridevit-*"))


def test_it_ends_with_the_load_whatever_it_holds(parent: Path) -> None:
    def fail() -> None:
        with scratch_folder() as folder:
            assert folder is not None
            (folder / "weights").write_bytes(b"x")
            assert folders(parent) == [folder]
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert folders(parent) == []


def test_that_of_a_killed_process_is_removed_by_the_next_load_and_that_of_a_living_one_is_not(parent: Path) -> None:
    code = "import time\nfrom service.models.scratch import scratch_folder\nwith scratch_folder() as folder:\n"
    code += "    (folder / 'weights').write_bytes(b'x')\n    print(folder, flush=True)\n    time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        theirs = Path(process.stdout.readline().strip())
        with scratch_folder() as ours:
            assert ours is not None
            assert folders(parent) == sorted([ours, theirs])
        assert folders(parent) == [theirs]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (theirs / "weights").exists()
    with scratch_folder() as ours:
        assert folders(parent) == [ours]


def test_folders_that_are_not_ours_stay(parent: Path) -> None:
    elsewhere = parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    (parent / "stridevit-load-link").symlink_to(elsewhere)
    (parent / "stridevit-load-new").mkdir()
    with scratch_folder():
        pass
    assert (elsewhere / "lock").exists()
    assert (parent / "stridevit-load-new").exists()


def test_without_a_place_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with scratch_folder() as folder:
        assert folder is None


def test_where_files_cannot_be_locked_there_is_one_all_the_same(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    with scratch_folder() as folder:
        assert folders(parent) == [folder]
    assert folders(parent) == []


def test_a_pipe_in_place_of_a_lock_holds_nobody_up(parent: Path) -> None:
    (parent / "stridevit-load-pipe").mkdir()
    os.mkfifo(parent / "stridevit-load-pipe" / "lock")
    with scratch_folder() as folder:
        assert folder is not None
