"""Services of other commits: unpacked, with the models and the settings that they know."""

import io
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from loadtests.errors import LoadTestError
from service.host import git

_FORMER_NAMES = {
    "allow_spinning": "spinning",
    "body_timeout_seconds": "read_seconds",
    "graceful_timeout_seconds": "drain_seconds",
    "intra_op_threads": "engine_threads",
    "max_images_per_request": "max_images",
    "max_pending_images": "max_pending",
    "shutdown_delay_seconds": "grace_seconds",
    "step_up_headroom": "recover_margin",
    "versions_to_serve": "keep_versions",
}
"""Settings that had other names once, for commits that know only those."""


class CommitError(LoadTestError):
    """A commit is not available in this checkout."""


def resolve(commit: str) -> str:
    """The hash of a commit, so that it stays the same while branches move on. Raises CommitError."""
    try:
        return git("rev-parse", "--verify", "--end-of-options", f"{commit}^{{commit}}")
    except (OSError, subprocess.CalledProcessError) as error:
        raise _unavailable(commit, error) from error


def checkout(digest: str, folder: Path) -> Path:
    """Unpack the commit of this hash into `folder`, unless it is there already. Raises CommitError."""
    source = folder / digest
    try:
        if not source.is_dir():
            command = ["git", "-C", str(_project()), "archive", "--format=tar", digest]
            packed = subprocess.run(command, check=True, capture_output=True).stdout  # noqa: S603 (our own command)
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(source, filter="data")
    except (OSError, subprocess.CalledProcessError) as error:
        raise _unavailable(digest, error) from error
    return source


def own_repository(repository: Path, source: Path) -> Path:
    """The commit's own folder of bundles if `repository` lies in this project and the commit has it, else itself."""
    project, wanted = _project(), repository.resolve()
    own = source / wanted.relative_to(project) if wanted.is_relative_to(project) else repository
    return own if own.is_dir() else repository


def environment_for(flags: Sequence[str]) -> dict[str, str]:
    """Flags of the service as variables, which stop no commit that does not know them, by present and former names."""
    variables = {**os.environ, **{_variable(name): value for name, value in parsed_flags(flags)}}
    for name, former in _FORMER_NAMES.items():
        if _variable(name) in variables:
            variables[_variable(former)] = variables[_variable(name)]
    return variables


def unknown_settings(flags: Sequence[str], source: Path) -> list[str]:
    """The settings among the flags that a commit does not know by any name."""
    page = source / "docs" / "settings.md"
    known = set(re.findall(r"`(\w+)`", page.read_text(encoding="utf-8"))) if page.is_file() else set()
    return [name for name, _ in parsed_flags(flags) if known and not known & {name, _FORMER_NAMES.get(name)}]


def parsed_flags(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(setting, value) of `--name VALUE`, `--name=VALUE`, `--name` and `--no-name`."""
    for position, flag in enumerate(flags):
        if not flag.startswith("--"):
            continue
        name, is_given, value = flag.removeprefix("--").partition("=")
        following = flags[position + 1] if position + 1 < len(flags) else "--"
        if not is_given and following.startswith("--"):
            name, value = name.removeprefix("no-"), str(not name.startswith("no-")).lower()
        elif not is_given:
            value = following
        yield name.replace("-", "_"), value


def _variable(setting: str) -> str:
    return f"STRIDEVIT_{setting.upper()}"


def _project() -> Path:
    return Path(git("rev-parse", "--show-toplevel")).resolve()


def _unavailable(commit: str, error: OSError | subprocess.CalledProcessError) -> CommitError:
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    return CommitError(f"commit {commit!r} is not available in this checkout: {text.strip()}")
