"""The configuration of the front, as Envoy itself reads it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings
from service.workers.envoy import Files, configuration, endpoints, find_envoy, threads_for, write_json


def written_to(folder: Path, **settings: Any) -> Files:
    """All files of a front."""
    files = Files(folder=folder)
    files.endpoints.parent.mkdir()
    write_json(files.endpoints, endpoints([folder / "w0-1.sock", folder / "w1-1.sock"], version=1))
    made = configuration(
        Settings(**settings),
        files,
        workers=2,
        token="secret",  # noqa: S106
        max_connections=1000,
    )
    write_json(files.configuration, made)
    return files


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"host": "::1", "port": 1234},
        {"trusted_proxies": ("10.0.0.0/8",), "max_url_bytes": 512, "max_head_bytes": 1024, "max_headers": 16},
        {"keep_alive_seconds": 0.5, "max_deadline_ms": 1_000_000, "body_timeout_seconds": 0.01},
    ],
)
def test_envoy_takes_the_configuration_without_a_word_of_warning(tmp_path: Path, settings: dict[str, Any]) -> None:
    program = find_envoy()
    if program is None:
        pytest.skip("needs the extra `workers`")
    files = written_to(tmp_path, **settings)
    command = [str(program), "--mode", "validate", "--log-level", "warning"]
    command += ["--config-path", str(files.configuration)]
    validated = subprocess.run(command, check=False, capture_output=True, text=True)
    assert validated.returncode == 0, validated.stderr
    assert validated.stderr == ""


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    files = written_to(tmp_path)
    write_json(files.endpoints, endpoints([], version=2))
    assert json.loads(files.endpoints.read_text())["version_info"] == "2"
    assert list(files.endpoints.parent.iterdir()) == [files.endpoints]


def test_one_thread_feeds_a_dozen_cores() -> None:
    assert [threads_for(cores) for cores in (1, 12, 13, 96)] == [1, 1, 2, 8]
