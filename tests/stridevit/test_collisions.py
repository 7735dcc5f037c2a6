"""A package of another project that has the name of one of ours is detected and named."""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import PATIENCE_SECONDS, ROOT


def check(*, cwd: Path, path: Path) -> str:
    """The error of `python -m stridevit key` in `cwd`, with `path` first in PYTHONPATH; empty if it succeeds."""
    command = [sys.executable, "-m", "stridevit", "key"]
    environment = {**os.environ, "PYTHONPATH": str(path), "COLUMNS": "200"}
    ended = subprocess.run(
        command, cwd=cwd, env=environment, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert (ended.returncode == 0) == (ended.stderr == "")
    return ended.stderr.rstrip("\n")


def install(site: Path, distribution: str, *packages: Path) -> None:
    """Copy packages into `site` with the record of a wheel, as pip would, over what is there."""
    lines = []
    for package in packages:
        shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        for file in sorted(path for path in package.rglob("*") if path.suffix == ".py"):
            digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).rstrip(b"=").decode()
            lines.append(f"{package.name}/{file.relative_to(package)},sha256={digest},{file.stat().st_size}\n")
    information = site / f"{distribution}-0.1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {distribution}\nVersion: 0.1.0\n")
    (information / "RECORD").write_text("".join(lines))


@pytest.fixture
def other_service(tmp_path: Path) -> Path:
    """Another project's package `service`."""
    folder = tmp_path / "other" / "service"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text('"""Create daemons."""\n')
    return folder


def test_package_that_hides_ours_is_named(other_service: Path) -> None:
    message = check(cwd=other_service.parent, path=ROOT)
    assert message.startswith(f"error: Python finds another project's package 'service' in {other_service}: ")
    assert "\n" not in message


def test_distribution_that_overwrote_ours_is_named(other_service: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(site, "stridevit", *(ROOT / name for name in ("stridevit", "service", "training", "export", "loadtests")))
    assert check(cwd=tmp_path, path=site) == ""
    install(site, "daemons", other_service)
    message = check(cwd=tmp_path, path=site)
    assert message.startswith(
        f"error: {site / 'service' / '__init__.py'} was overwritten by the distribution 'daemons'"
    )
    assert "a separate environment" in message


def test_folder_without_modules_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    assert check(cwd=tmp_path, path=ROOT) == ""
