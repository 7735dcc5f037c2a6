"""How an arm is written, and what is known of its model."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadtests.experiment.arms import ArmError, bundles, describe, flags_of, parse_arms, repeated
from loadtests.experiment.model import Arm
from loadtests.experiment.server import Server, ServerError
from service.host import git
from tests.processes import in_a_checkout


def test_models_settings_and_urls_are_arms() -> None:
    arms = parse_arms("a, a?max_batch=1&allow_spinning=false, a@http://10.0.0.7:8000, a")
    assert arms == (
        Arm(label="a", model="a"),
        Arm(
            label="a?max_batch=1&allow_spinning=false",
            model="a",
            settings=(("max_batch", "1"), ("allow_spinning", "false")),
        ),
        Arm(label="a@http://10.0.0.7:8000", model="a", url="http://10.0.0.7:8000"),
    )
    assert flags_of(arms[1]) == ["--max-batch=1", "--no-allow-spinning"]
    assert repeated(arms[0]) == Arm(label="a (again)", model="a", repeat_of="a")


@in_a_checkout
def test_commits_are_arms_by_their_hashes() -> None:
    label = "a?max_batch=1@git:HEAD"
    (arm,) = parse_arms(label)
    assert arm == Arm(label=label, model="a", settings=(("max_batch", "1"),), commit=git("rev-parse", "HEAD"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" , ", "no model is named"),
        ("@http://a:1", "begins with the name of a model"),
        ("a?max_batch", "settings are written"),
        ("a?--x=1", "settings are written"),
        ("a@ftp://x", "http://HOST:PORT or git:COMMIT"),
        ("a@git:", "http://HOST:PORT or git:COMMIT"),
        ("a?max_batch=1@http://a:1", "cannot be given to a server"),
        ("a@http://me:secret@b", "has a password"),
    ],
)
def test_a_malformed_arm_is_refused_with_the_right_form(text: str, reason: str) -> None:
    with pytest.raises(ArmError, match=reason):
        parse_arms(text)


class Described(Server):
    """A server that answers `GET /v1/models/NAME` with this, or not at all."""

    def __init__(self, detail: dict[str, Any] | None) -> None:
        super().__init__("http://nowhere", name="the server")
        self._detail = detail

    def model(self, name: str) -> dict[str, Any]:
        if self._detail is None:
            raise OSError("refused")
        return self._detail


@pytest.mark.parametrize("version", [1, 2])
def test_facts_come_from_the_manifest_whatever_its_version(version: int, repository: Path) -> None:
    manifest = json.loads((repository / "digits-csra-r2" / "1" / "manifest.json").read_text())
    if version == 1:
        manifest = json.loads((Path(__file__).parents[2] / "service" / "manifest_v1.json").read_text())
    server = Described({"version": 1, "batch_ms": {"1": 2.5}, "manifest": manifest})
    facts = describe(Arm(label="a", model="digits-csra-r2"), server, repository)
    assert {"name", "variant", "tokens", "kv_tokens", "params", "precision", "accuracy", "source"} <= facts.keys()
    assert (facts["version"], facts["batch_ms"]) == (1, {"1": 2.5})
    assert facts["kv_tokens"] < facts["tokens"]
    assert facts["sha256"] == bundles([Arm(label="a", model="digits-csra-r2")], repository)["digits-csra-r2/1"]


def test_a_server_at_a_url_may_know_nothing_but_ours_must(repository: Path) -> None:
    silent = Described(None)
    assert describe(Arm(label="a", model="a", url="http://nowhere"), silent, repository) == {}
    with pytest.raises(ServerError, match="does not say what 'a' is"):
        describe(Arm(label="a", model="a"), silent, repository)
