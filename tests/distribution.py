"""Install the wheel of dist/ into a new environment and serve with it in a folder elsewhere: what `make dist` does.

python -m tests.distribution dist lock/service-cpu.txt
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

from deploy import ask
from tests.clients.checks import check, png, same
from tests.processes import ROOT, serving

PACKAGES = ("stridevit", "training", "export", "service", "loadtests")
DOCUMENTS = ("LICENSE", "CHANGELOG.md", "README.md")
MODEL = "cifar100-csra-r2"


def main(dist: Path, lock: Path) -> None:
    """Print a line for each check; the first that fails ends the run with 1."""
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    os.environ.pop("PYTHONPATH", None)  # nothing but what is installed may be imported
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    with check(f"{wheel.name} and {source.name} hold every file of the packages, the licence and the changes"):
        _complete(wheel, source)
    with tempfile.TemporaryDirectory(prefix="stridevit-dist-") as folder:
        work = Path(folder)
        with check(f"the wheel is installed with {lock} into a new environment"):
            _run(sys.executable, "-m", "venv", work / "venv")
            pip = work / "venv" / "bin" / "pip"
            _run(pip, "install", "--quiet", "--require-hashes", "--requirement", lock.resolve())
            _run(pip, "install", "--quiet", "--no-index", "--no-deps", wheel.resolve())
            _run(pip, "check")
        stridevit = work / "venv" / "bin" / "stridevit"
        elsewhere = _foreign_project(work / "elsewhere")
        with check(f"stridevit --version says {version}"):
            same(_run(stridevit, "--version", cwd=elsewhere).stdout, f"stridevit {version}\n")
        with check("stridevit check verifies a shipped model, in a folder with another service.py and training/"):
            _run(stridevit, "check", "--repository", ROOT / "models", "--models", MODEL, cwd=elsewhere)
        with check("stridevit train names the extra that it needs"):
            ended = _run(stridevit, "train", "--help", cwd=elsewhere, status=1)
            same(ended.stderr, "error: stridevit train needs PyTorch: pip install 'stridevit[train]'\n")
        with check("stridevit serve answers, and ends with 0"):
            photo = elsewhere / "photo.png"
            photo.write_bytes(png(bytes(32 * 32 * 3), width=32, height=32))
            command = [str(stridevit), "serve", "--models", MODEL]
            with serving(ROOT / "models", command=command, cwd=elsewhere) as (url, process):
                ask.main(url, photo)
            same(process.returncode, 0, "exit status after SIGTERM")


def _complete(wheel: Path, source: Path) -> None:
    tracked = set(_run("git", "ls-files", *PACKAGES, cwd=ROOT).stdout.splitlines())
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    same(sorted(tracked - {*names}), [], "missing in the wheel")
    same(
        sorted(name for name in names if name.startswith(PACKAGES) and name.split("/")[0] in PACKAGES), sorted(tracked)
    )
    for document in ("LICENSE", "CHANGELOG.md"):
        same([Path(name).name for name in names].count(document), 1, f"{document} in the wheel")
    with tarfile.open(source) as packed:
        files = {name.partition("/")[2] for name in packed.getnames()}
    same(sorted({*tracked, *DOCUMENTS} - files), [], "missing in the source distribution")


def _foreign_project(folder: Path) -> Path:
    """A folder with modules that have the same names as our packages."""
    (folder / "training").mkdir(parents=True)
    for file in (folder / "service.py", folder / "training" / "__init__.py"):
        file.write_text("raise SystemExit('the wrong module')\n")
    return folder


def _run(*words: str | Path, cwd: Path | None = None, status: int = 0) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(words, cwd=cwd, check=False, capture_output=True, text=True)
    if ended.returncode != status:
        raise AssertionError(f"{words[0]} ended with {ended.returncode}: {ended.stdout}{ended.stderr}")
    return ended


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
