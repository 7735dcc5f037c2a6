"""`export index`: what a service reads from a web server."""

from pathlib import Path

from typer.testing import CliRunner

from export.__main__ import app
from service.remote.web_index import parse_index
from tests.service.identity import publish_identity


def test_the_index_lists_every_version_and_replaces_the_one_before(tmp_path: Path) -> None:
    for versions in (1, 2):
        publish_identity(tmp_path)
        result = CliRunner().invoke(app, ["index", "--repository", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert f"index.json: {versions} versions" in result.output
    assert sorted(parse_index((tmp_path / "index.json").read_bytes())) == [("identity-a", 1), ("identity-a", 2)]


def test_without_a_repository_it_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["index", "--repository", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "error: no model repository at" in " ".join(result.output.split())
