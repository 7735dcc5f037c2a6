"""Services of other commits: unpacked, with the models and the settings that they know."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
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
"""Former names of settings, for commits that know only those."""
_FLAG = re.compile(r"^--(no-)?([\w-]+)(?:(?:=|\n(?!--))(.*))?$", re.MULTILINE)
"""`--name=VALUE`, `--name`, `--no-name`, or `--name` and VALUE on the next line."""


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
            packed = folder / f"{digest}.tar"
            git("-C", str(_project()), "archive", f"--output={packed}", digest)
            shutil.unpack_archive(packed, source, filter="data")
    except (OSError, subprocess.CalledProcessError) as error:
        raise _unavailable(digest, error) from error
    return source


def own_repository(repository: Path, source: Path) -> Path:
    """The commit's own `repository` if that lies in this project and the commit has one, else `repository` itself."""
    project, wanted = _project(), repository.resolve()
    own = source / wanted.relative_to(project) if wanted.is_relative_to(project) else repository
    return own if own.is_dir() else repository


def environment_for(flags: Sequence[str]) -> dict[str, str]:
    """Flags as environment variables, by present and former names; a commit ignores those that it does not know."""
    variables = {**os.environ, **{_variable(name): value for name, value in parsed_flags(flags).items()}}
    for name, former in _FORMER_NAMES.items():
        if _variable(name) in variables:
            variables[_variable(former)] = variables[_variable(name)]
    return variables


def unknown_settings(flags: Sequence[str], source: Path) -> list[str]:
    """The settings among the flags that a commit does not know by any name."""
    page = source / "docs" / "settings.md"
    known = set(re.findall(r"`(\w+)`", page.read_text(encoding="utf-8"))) if page.is_file() else set()
    return [name for name in parsed_flags(flags) if known and not known & {name, _FORMER_NAMES.get(name)}]


def parsed_flags(flags: Sequence[str]) -> dict[str, str]:
    """Values of the settings by name; a flag without one is `true`, or `false` if it begins with `--no-`."""
    return {
        name.replace("-", "_"): str(not no).lower() if value is None else value
        for no, name, value in (flag.groups() for flag in _FLAG.finditer("\n".join(flags)))
    }


def _variable(setting: str) -> str:
    return f"STRIDEVIT_{setting.upper()}"


def _project() -> Path:
    return Path(git("rev-parse", "--show-toplevel")).resolve()


def _unavailable(commit: str, error: OSError | subprocess.CalledProcessError) -> CommitError:
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
    return CommitError(f"commit {commit!r} is not available in this checkout: {str(said).strip()}")
