"""A service whose answers are known."""

import threading
from collections.abc import Iterator

import pytest

from tests.loadtests.accuracy.fakes import Fake


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
