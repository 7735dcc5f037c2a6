"""How arms are written, and what is known about their models.

cifar100-mha                                    a model of the repository
cifar100-mha?max_batch=1&intra_op_threads=2     the same, with settings of the service for this arm alone
cifar100-mha@http://10.0.0.7:8000               served by a server that already runs
cifar100-mha@git:v0.3                           served by the service of another commit, from its own models
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from loadtests.errors import LoadTestError
from loadtests.experiment.commits import resolve
from loadtests.experiment.model import Arm
from loadtests.experiment.server import Server, ServerError
from service.bundle import MODEL_FILE, versions
from service.manifest import Manifest

_SETTING = re.compile(r"[a-z][a-z0-9_]*")
_FACTS = ("name", "family", "architecture", "params", "macs", "precision", "num_classes", "random_weights")


class ArmError(LoadTestError):
    """An arm is malformed; the message says how one is written."""


def parse_arms(text: str) -> tuple[Arm, ...]:
    """Arms separated by commas, without repetitions; commits by their hashes. Raises ArmError or CommitError."""
    words = dict.fromkeys(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise ArmError("no model is named: separate names with commas")
    return tuple(parse_arm(word) for word in words)


def parse_arm(word: str) -> Arm:
    """One arm. Raises ArmError or CommitError."""
    what, _, where = word.partition("@")
    model, _, query = what.partition("?")
    if not model:
        raise ArmError(f"{word!r}: an arm begins with the name of a model")
    settings = tuple(parse_qsl(query, keep_blank_values=True))
    if any(not _SETTING.fullmatch(name) or not value for name, value in settings) or (query and not settings):
        raise ArmError(f"{word!r}: settings are written MODEL?NAME=VALUE&NAME=VALUE, named as in docs/settings.md")
    arm = Arm(label=word, model=model, settings=settings)
    if where.startswith("git:") and len(where) > len("git:"):
        return replace(arm, commit=resolve(where.removeprefix("git:")))
    if not where:
        return arm
    parts = urlsplit(where)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ArmError(f"{word!r}: after @ comes http://HOST:PORT or git:COMMIT")
    if parts.username or parts.password:
        raise ArmError(f"the URL of the arm at {parts.hostname} has a password, which the report would show")
    if settings:
        raise ArmError(f"{word!r}: settings cannot be given to a server that already runs")
    return replace(arm, url=where)


def repeated(arm: Arm) -> Arm:
    """The same arm under another name: the A/A arm."""
    return replace(arm, label=f"{arm.label} (again)", repeat_of=arm.label)


def flags_of(arm: Arm) -> list[str]:
    """The arm's own settings as flags of the service."""
    switches = {"true": "--{}", "false": "--no-{}"}
    return [switches.get(value, "--{}=" + value).format(name.replace("_", "-")) for name, value in arm.settings]


def describe(arm: Arm, server: Server, repository: Path) -> dict[str, Any]:
    """Facts about the arm's model: fields of its manifest, version, batch_ms, and sha256 of the graph.

    From a server at a URL, as many as it gives. Raises ServerError if our own service does not answer.
    """
    try:
        detail = server.model(arm.model)
        # Another commit may use version 1 of the schema, which is converted.
        manifest = Manifest.model_validate(detail["manifest"])
    except (OSError, ValueError, LookupError) as error:
        if arm.url is None:
            raise ServerError(f"{server.name} does not say what {arm.model!r} is: {error}") from error
        return {}
    facts = manifest.model_dump(mode="json", include={*_FACTS, "accuracy", "source"})
    if manifest.attention:
        facts |= manifest.attention.model_dump(include={"variant", "tokens", "kv_tokens"})
    if arm.url is None:
        facts["sha256"] = _sha256(repository / arm.model / str(detail["version"]))
    size = manifest.preprocessing.crop
    return {**facts, "img_size": size, "version": detail["version"], "batch_ms": detail["batch_ms"]}


def bundles(arms: Sequence[Arm], repository: Path) -> dict[str, str]:
    """Digests of the graphs that a repository would serve now, by model and version."""
    return {
        f"{model}/{version}": _sha256(repository / model / str(version))
        for model in sorted({arm.model for arm in arms if arm.url is None})
        for version in versions(repository, model)
    }


def _sha256(bundle: Path) -> str:
    return hashlib.sha256((bundle / MODEL_FILE).read_bytes()).hexdigest()
