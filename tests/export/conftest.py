"""What all tests of the export share."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread(one_torch_thread: None) -> None:
    """All tests here use torch."""
