"""What is compared, as one writes it, and how each arm's server is had.

cifar100-mha                          a model of the repository
cifar100-mha?max_batch=1&intra_op_threads=2    the same, with settings of the service for this arm alone
cifar100-mha@http://10.0.0.7:8000     as a server elsewhere answers it
cifar100-mha@git:v0.3                 as the service of another commit serves it
"""

import io
import re
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from loadtests.errors import LoadTestError
from loadtests.experiment.model import Arm
from loadtests.experiment.server import Server, ServerError, remote_server, running_server
from service.host import git

_SETTING = re.compile(r"[a-z][a-z0-9_]*")


class ArmError(LoadTestError):
    """An arm that cannot be understood; the message says how one is written."""


def parse_arms(text: str) -> tuple[Arm, ...]:
    """Arms separated by commas; each once. Raises ArmError."""
    words = dict.fromkeys(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise ArmError("no model is named: separate names with commas")
    return tuple(_parse(word) for word in words)


def _parse(word: str) -> Arm:
    what, _, where = word.partition("@")
    model, _, query = what.partition("?")
    if not model:
        raise ArmError(f"{word!r}: an arm begins with the name of a model")
    settings = tuple(parse_qsl(query, keep_blank_values=True))
    if any(not _SETTING.fullmatch(name) or not value for name, value in settings) or (query and not settings):
        raise ArmError(
            f"{word!r}: settings are written MODEL?NAME=VALUE&NAME=VALUE, by their names in docs/settings.md"
        )
    if where.startswith("git:") and len(where) > len("git:"):
        return Arm(label=word, model=model, settings=settings, commit=where.removeprefix("git:"))
    if where:
        parts = urlsplit(where)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ArmError(f"{word!r}: after @ comes http://HOST:PORT or git:COMMIT")
        if parts.username or parts.password:
            raise ArmError(f"an arm at {parts.hostname} has a password in its URL, which would stand in the report")
        if settings:
            raise ArmError(f"{word!r}: a server that runs already cannot be given settings")
        return Arm(label=word, model=model, url=where)
    return Arm(label=word, model=model, settings=settings)


def repeated(arm: Arm) -> Arm:
    """The same again, under another name: the A/A arm."""
    return replace(arm, label=f"{arm.label} (again)", repeat_of=arm.label)


def resolved(arm: Arm) -> Arm:
    """With the hash of its commit, so that it stays the same while branches move on. Raises ArmError."""
    if arm.commit is None:
        return arm
    try:
        return replace(arm, commit=git("rev-parse", "--verify", "--end-of-options", f"{arm.commit}^{{commit}}"))
    except (OSError, subprocess.CalledProcessError) as error:
        raise ArmError(f"commit {arm.commit!r} cannot be had from this checkout: {_said(error)}") from error


def checkout(digest: str, folder: Path) -> Path:
    """Unpack the commit of this hash into `folder`, once. Raises ArmError."""
    try:
        into = folder / digest
        if not into.is_dir():
            top = git("rev-parse", "--show-toplevel")
            packed = subprocess.run(  # noqa: S603 (our own command)
                ["git", "-C", top, "archive", "--format=tar", digest],  # noqa: S607
                check=True,
                capture_output=True,
            ).stdout
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(into, filter="data")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ArmError(f"commit {digest} cannot be had from this checkout: {_said(error)}") from error
    return into


def _said(error: OSError | subprocess.CalledProcessError) -> str:
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
    return (said.decode(errors="replace") if isinstance(said, bytes) else str(said)).strip()


@contextmanager
def serving(arm: Arm, *, repository: Path, arguments: Sequence[str], checkouts: Path, log: Path) -> Iterator[Server]:
    """The arm's server, fresh unless it runs elsewhere. Raises ServerError or ArmError."""
    if arm.url is not None:
        yield remote_server(arm.url)
        return
    source = checkout(arm.commit, checkouts) if arm.commit else None
    own = [word for name, value in arm.settings for word in (f"--{name.replace('_', '-')}", value)]
    with running_server(repository, arm.model, log=log, arguments=[*arguments, *own], source=source) as server:
        yield server


def describe(arm: Arm, server: Server, repository: Path) -> dict[str, Any]:
    """What its server says of the model, and the digest of its graph; of somebody else's, as much as it does."""
    try:
        said = server.model(arm.model)
    except ServerError:
        if arm.url is None:
            raise
        return {}
    if arm.url is None and said.get("version") is not None:
        said["sha256"] = _digest(repository / arm.model / str(said["version"]))
    return said


def bundles(arms: Sequence[Arm], repository: Path) -> dict[str, str | None]:
    """The digests of the graphs that a repository would serve now, by model and version."""
    folders = {folder for arm in arms if arm.url is None for folder in (repository / arm.model).glob("[0-9]*")}
    return {f"{folder.parent.name}/{folder.name}": _digest(folder) for folder in sorted(folders)}


def _digest(bundle: Path) -> str | None:
    sums = bundle / "SHA256SUMS"
    if not sums.is_file():
        return None
    lines = [line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8").splitlines()]
    return next((digest for digest, name in lines if name == "model.onnx"), None)
