"""A service in this process, over the repository of the session's small model."""

import asyncio
import hashlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service.app import create_app
from service.bundle import CONTENT_FILES, SUMS_FILE
from service.logs import Logs
from service.scheduling.scheduler import Scheduler
from service.settings import Settings
from tests.processes import PATIENCE_SECONDS


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """An image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30, *, seed: int = 0) -> Image.Image:
    """Random colours, blurred."""
    coarse = np.random.default_rng(seed).integers(0, 256, size=(4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


PNG = encoded(noise(32, 32))
"""A picture of the model's own size."""


def resum(bundle: Path) -> None:
    """Write the digests again after a bundle was edited."""
    lines = [f"{hashlib.sha256((bundle / file).read_bytes()).hexdigest()}  {file}\n" for file in CONTENT_FILES]
    (bundle / SUMS_FILE).write_text("".join(lines))


class Clock:
    """Time that passes only when a test says so, in place of `time.perf_counter`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def images_waiting(scheduler: Scheduler) -> int:
    """Images in all queues."""
    return sum(len(queue) for queue in scheduler.queues)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 (another thread makes it true)
            await asyncio.sleep(0.001)


@pytest.fixture
def _no_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configured logging would outlive the test, and write to its closed output."""
    monkeypatch.setattr(Logs, "_install", lambda _: None)


@pytest.fixture(autouse=True)
def _logging_is_as_before() -> Iterator[None]:
    """Fail the test that leaves the service's logging in this process, rather than a later one."""
    yield
    assert not any(type(handler).__module__ == "service.logs" for handler in logging.getLogger().handlers)


@pytest.fixture(scope="module")
def client(repository: Path) -> Iterator[TestClient]:
    """HTTP in this process, without a socket."""
    settings = Settings(
        repository=repository, max_body_bytes=200_000, max_pixels=1_000_000, max_images_per_request=4, threads=1
    )
    with TestClient(create_app(settings), raise_server_exceptions=False) as session:
        yield session
