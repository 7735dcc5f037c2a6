"""Services of other commits are started with their own models, and with the settings that they know."""

from pathlib import Path

import pytest

from loadtests.experiment.commits import (
    CommitError,
    checkout,
    environment_for,
    own_repository,
    parsed_flags,
    resolve,
    unknown_settings,
)
from service.host import git
from tests.processes import ROOT, in_a_checkout


@in_a_checkout
def test_a_commit_is_unpacked_once_and_serves_its_own_models(tmp_path: Path) -> None:
    digest = resolve("HEAD")
    assert digest == git("rev-parse", "HEAD")
    source = checkout(digest, tmp_path)
    assert (source / "service" / "app.py").is_file()
    assert checkout(digest, tmp_path) == source
    assert own_repository(ROOT / "models", source) == source / "models"
    # A folder elsewhere, or one that the commit does not have, is served as it is.
    for other in (tmp_path, ROOT / "no-such-folder"):
        assert own_repository(other, source) == other


@in_a_checkout
@pytest.mark.parametrize("wrong", ["no-such-commit", "--output=x"])
def test_an_unknown_commit_is_an_error(wrong: str) -> None:
    with pytest.raises(CommitError, match="is not available in this checkout"):
        resolve(wrong)


def test_flags_are_read_however_they_are_written() -> None:
    flags = ["--max-batch", "8", "--threads=2", "--tf32", "--no-allow-spinning", "--log-requests", "all"]
    assert parsed_flags(flags) == {
        "max_batch": "8",
        "threads": "2",
        "tf32": "true",
        "allow_spinning": "false",
        "log_requests": "all",
    }


def test_a_commit_gets_settings_by_present_and_former_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIDEVIT_MAX_PENDING_IMAGES", "9")
    monkeypatch.setenv("STRIDEVIT_THREADS", "1")
    variables = environment_for(["--intra-op-threads", "2", "--threads", "3"])
    assert variables["STRIDEVIT_INTRA_OP_THREADS"] == variables["STRIDEVIT_ENGINE_THREADS"] == "2"
    assert variables["STRIDEVIT_MAX_PENDING"] == "9"
    # As on the command line, a flag wins over the environment.
    assert variables["STRIDEVIT_THREADS"] == "3"


def test_settings_that_a_commit_knows_by_no_name_are_found(tmp_path: Path) -> None:
    assert unknown_settings(["--brand-new", "1"], tmp_path) == []
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "settings.md").write_text("| `engine_threads` | ...\n| `threads` | ...\n")
    flags = ["--intra-op-threads", "1", "--threads", "2", "--brand-new"]
    assert unknown_settings(flags, tmp_path) == ["brand_new"]
