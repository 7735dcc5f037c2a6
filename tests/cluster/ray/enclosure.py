"""Runs a scenario in namespaces of its own. Needs no Ray: the scenario's interpreter has it."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run(python: str, scenario: str, out: Path, *, repository: Path, model: str, seconds: float) -> int:
    """Run a scenario of `tests.cluster.ray.scenarios`, as root, and return its status; what it counts goes to `out`.

    In its network nothing but `lo` is up. When it ends, or is killed after `seconds`, or whoever started it ends, the
    kernel ends every process of Ray with it. If it fails, Ray's logs are left beside `out`.
    """
    # Not by TMPDIR: the path of a socket may have 107 bytes, and Ray's are deep in its folder.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    unshare = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [python, "-m", "tests.cluster.ray.scenarios", scenario, str(out), "--folder", str(folder)]
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
