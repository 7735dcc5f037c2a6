"""What the tests of the clients share."""

from collections.abc import Iterator

import pytest

from tests.stridevit.stub import Stub, stub_server


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server() as server:
        yield server
