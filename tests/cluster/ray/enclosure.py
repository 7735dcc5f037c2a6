"""Runs scenarios in namespaces of their own. Needs no Ray: the interpreter of the scenarios has it."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]


def variables() -> dict[str, str]:
    """The variables that deploy/ray.env sets, as a shell reads it."""
    shell = ["sh", "-c", 'set -a; . "$0"; exec env -0', str(ROOT / "deploy" / "ray.env")]
    clean = {"PATH": os.environ["PATH"]}
    found = subprocess.run(shell, check=True, stdout=subprocess.PIPE, text=True, env=clean).stdout
    pairs = (entry.partition("=") for entry in found.split("\0") if entry)
    return {name: value for name, _, value in pairs if name.startswith("RAY_")}


def run(python: str, scenarios: Sequence[str], out: Path, *, repository: Path, model: str, seconds: float) -> int:
    """Run scenarios of `tests.cluster.ray.scenarios`, as root, and return the status; what they count goes to `out`.

    In their network nothing but `lo` is up. When they end, or are killed after `seconds`, or whoever started them ends,
    the kernel ends every process of Ray too. If they fail, Ray's logs are left beside `out`.
    """
    # Not by TMPDIR: the path of a socket may have 107 bytes, and Ray's are deep in its folder.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    unshare = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [python, "-m", "tests.cluster.ray.scenarios", *scenarios, "--out", str(out), "--folder", str(folder)]
    command += ["--repository", str(repository.absolute()), "--model", model]
    try:
        process = subprocess.Popen(
            [*unshare, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        try:
            return process.wait(seconds)
        finally:
            process.kill()
            logs = folder / "session_latest" / "logs"
            if process.wait() and logs.is_dir():
                shutil.copytree(logs, out.with_suffix(".logs"), symlinks=True, dirs_exist_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
