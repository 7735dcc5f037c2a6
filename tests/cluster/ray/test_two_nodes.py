"""The service on two Ray nodes: what is lost when nodes die, replicas come and go, and configurations change."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.ray.enclosure import ROOT, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]
_SECONDS = 3000.0


def counts(name: str, tmp_path: Path) -> list[dict[str, Any]]:
    """What a scenario counted; skips the test where it cannot run."""
    python = os.environ.get("STRIDEVIT_RAY_PYTHON")
    if not python:
        pytest.skip("needs Ray: set STRIDEVIT_RAY_PYTHON to a Python with stridevit[cpu,ray]")
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv", "ip"))):
        pytest.skip("needs root, and `unshare`, `setpriv` and `ip` for namespaces")
    out = tmp_path / "counts.json"
    status = run(python, [name], out, repository=ROOT / "models", model="cifar100-csra-r2", seconds=_SECONDS)
    assert status == 0, f"the scenario ended with {status}; Ray's logs are in {out.with_suffix('.logs')}"
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))[name]
    return found


def test_a_killed_node_loses_no_request(tmp_path: Path) -> None:
    found = counts("kill", tmp_path)
    assert len(found) == 3
    for each in found:
        assert each["processes_killed"] > 1
        assert each["answered"] >= 2000
        assert each["failures"] == {}


def test_replicas_follow_the_load_without_a_lost_request(tmp_path: Path) -> None:
    found = counts("scale", tmp_path)
    assert [each["replicas"] for each in found] == [1, 2, 1]
    assert [each["failures"] for each in found] == [{}, {}, {}]


def test_a_new_configuration_replaces_all_replicas_without_a_lost_request(tmp_path: Path) -> None:
    (found,) = counts("redeploy", tmp_path)
    assert found["replaced"] is True
    assert found["answered"] >= 2000
    assert found["failures"] == {}
