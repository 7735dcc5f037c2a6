"""Install NVIDIA's perf_analyzer into a folder, also where the C library is older than the 2.38 that it needs.

    python -m tests.clients.perf_install .venv-clients/perf lock/client-perf.txt

The wheel is requested by its platform tag, since pip on an older system would silently take the empty 0.1.0 instead.
There the program runs with the libraries and the loader of a newer Debian, unpacked beside it: fetched by apt from the
machine's mirror and checked against Debian's keys.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.clients.checks import fail

NEEDED_GLIBC = (2, 38)
NEEDED_VERSION = (2, 60)

_SUITE = "trixie"
_PACKAGES = ("libc6", "libgcc-s1", "libssl3t64", "libstdc++6", "libzstd1", "zlib1g")
_DEFAULT_MIRROR = "http://deb.debian.org/debian"
_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}


def command(folder: Path) -> list[str]:
    """The command line of the perf_analyzer in `folder`. Ends the run unless it is the real one and starts."""
    version = installed_version(folder)
    if version < NEEDED_VERSION:
        fail(f"{folder} has perf-analyzer {'.'.join(map(str, version)) or 'not at all'}; 2.60 or newer is needed")
    program = folder / "site" / "perf_analyzer" / "bin" / "perf_analyzer"
    if not program.is_file() or program.read_bytes()[:4] != b"\x7fELF":
        fail(f"{program} is not a program: the package is empty")
    libraries = folder / "debian" / "usr" / "lib" / f"{platform.machine()}-linux-gnu"
    loader = libraries / _LOADERS.get(platform.machine(), "none")
    words = [str(loader), "--library-path", str(libraries), str(program)] if loader.exists() else [str(program)]
    started = subprocess.run([*words, "--version"], capture_output=True, text=True, check=False)
    if started.returncode != 0 or "Perf Analyzer" not in started.stdout + started.stderr:
        fail(f"{program} does not start: {started.stderr.strip() or started.returncode}")
    return words


def installed_version(folder: Path) -> tuple[int, ...]:
    """The package's own version (the program itself says 0.0.0); empty if there is none."""
    for metadata in (folder / "site").glob("perf_analyzer-*.dist-info/METADATA"):
        found = re.search(r"^Version: ([0-9.]+)", metadata.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return tuple(int(part) for part in found[1].split("."))
    return ()


def install(folder: Path, lock: Path) -> None:
    """Fill `folder`. Ends the run with the reason if that is impossible here."""
    if sys.platform != "linux" or platform.machine() not in _LOADERS:
        fail(f"perf_analyzer is published for Linux on {' and '.join(_LOADERS)}, not for this machine")
    shutil.rmtree(folder, ignore_errors=True)
    _run(sys.executable, "-m", "venv", folder / "venv")
    pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    tag = f"manylinux_{NEEDED_GLIBC[0]}_{NEEDED_GLIBC[1]}_{platform.machine()}"
    wheel = ["--platform", tag, "--only-binary", ":all:", "--no-deps", "--target", str(folder / "site")]
    _run(*pip, *wheel, "--require-hashes", "-r", lock)
    glibc = _glibc()
    if glibc < NEEDED_GLIBC:
        print(f"  glibc here is {'.'.join(map(str, glibc))}: fetching that of Debian {_SUITE}", flush=True)
        _unpack_libraries(folder / "debian")
    command(folder)


def _glibc() -> tuple[int, ...]:
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (ValueError, OSError):
        fail("perf_analyzer needs glibc, which this system does not have")
    return tuple(int(part) for part in version.split(".")) if name == "glibc" else ()


def _unpack_libraries(folder: Path) -> None:
    """Download packages with apt into a separate state folder, so that the machine's package state is left alone."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            fail(f"perf_analyzer needs glibc {NEEDED_GLIBC[0]}.{NEEDED_GLIBC[1]}, and {tool} to fetch it is missing")
    if not _KEYS.exists():
        fail(f"{_KEYS} is missing: install debian-archive-keyring, which proves that the packages are Debian's")
    state = folder.resolve() / "apt"
    for part in ("lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True)
    (state / "status").touch()
    settings = {
        "Dir::Etc::SourceList": state / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": state,
        "Dir::State::Lists": state / "lists",
        "Dir::State::Status": state / "status",
        "Dir::Cache": state / "cache",
        "APT::Sandbox::User": "",
        "APT::Get::AllowUnauthenticated": "false",
        "Acquire::AllowInsecureRepositories": "false",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
    }
    apt = ["apt-get", "-qq", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]
    # A mirror of one's own need not have a suite that the machine itself does not use.
    for mirror in dict.fromkeys((_mirror(), _DEFAULT_MIRROR)):
        (state / "sources.list").write_text(f"deb [signed-by={_KEYS}] {mirror} {_SUITE} main\n", encoding="utf-8")
        steps = ([*apt, "update"], [*apt, "download", *_PACKAGES])
        if all(subprocess.run(step, cwd=state, check=False).returncode == 0 for step in steps):
            break
    else:
        fail(f"apt cannot get {', '.join(_PACKAGES)} of Debian {_SUITE}")
    for package in state.glob("*.deb"):
        _run("dpkg-deb", "--extract", package, folder)
    shutil.rmtree(state)


def _mirror() -> str:
    """This machine's Debian mirror; Debian's own address if this is not Debian or has no sources."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines() if "=" in line
    )
    if release.get("ID", "").strip('"') != "debian":
        return _DEFAULT_MIRROR
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)"], capture_output=True, text=True, check=False
    )
    suites = {release.get("VERSION_CODENAME", "").strip('"'), "stable", "oldstable"}
    for line in listed.stdout.splitlines():
        suite, _, address = line.partition(" ")
        if suite in suites and address:
            return address.rstrip("/")
    return _DEFAULT_MIRROR


def _run(*words: str | Path) -> None:
    done = subprocess.run(words, check=False)
    if done.returncode != 0:
        fail(f"{' '.join(map(str, words))}: ended with {done.returncode}")


if __name__ == "__main__":
    install(Path(sys.argv[1]), Path(sys.argv[2]))
