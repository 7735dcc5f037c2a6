"""Bodies that arrive slowly, or not to their end, hold little and not for long."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from service.app import create_app
from service.http.body import Pace
from service.settings import Settings
from tests.service.conftest import Clock, until
from tests.service.identity import picture, publish_identity


@pytest.mark.parametrize(
    ("received", "slow"),
    [
        ([500, 500, 500], [False, False, False]),
        ([499, 500, 500], [True, False, False]),
        ([10_000_000, 0, 0], [False, True, True]),
    ],
    ids=["just fast enough", "slow from the start", "fast, then stopped"],
)
def test_each_window_has_to_bring_its_bytes(received: list[int], slow: list[bool]) -> None:
    clock = Clock()
    pace = Pace(100, 5.0, clock)
    found = []
    for count in received:
        clock.now += 2.5
        pace.received(count)
        assert not pace.too_slow(), "the window lasts"
        clock.now += 2.5
        found.append(pace.too_slow())
    assert found == slow


def test_a_client_is_not_blamed_for_a_service_that_was_stopped() -> None:
    clock = Clock()
    pace = Pace(100, 5.0, clock)
    clock.now += 60
    assert not pace.too_slow()
    clock.now += 5
    assert pace.too_slow()


def test_without_a_rate_every_pace_is_accepted() -> None:
    clock = Clock()
    pace = Pace(0, 5.0, clock)
    clock.now += 5
    assert not pace.too_slow()


class Upload:
    """A request straight to the application, whose body comes in the pieces that a test sends."""

    def __init__(self, app: Any, *, length: int | None = None) -> None:
        self._app = app
        self._pieces: asyncio.Queue[Message] = asyncio.Queue()
        self._headers = [] if length is None else [(b"content-length", b"%d" % length)]
        self.answer: list[Message] = []

    def send(self, data: bytes, *, last: bool = False) -> None:
        self._pieces.put_nowait({"type": "http.request", "body": data, "more_body": not last})

    async def call(self) -> int:
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/classify", "headers": self._headers}

        async def keep(message: Message) -> None:
            self.answer.append(message)

        await self._app({**scope, "query_string": b""}, self._pieces.get, keep)
        status: int = self.answer[0]["status"]
        return status


def test_uploads_that_stop_get_408_and_give_back_what_they_held(tmp_path: Path) -> None:
    publish_identity(tmp_path)
    settings = Settings(repository=tmp_path, threads=1, min_upload_rate=10_000, upload_window_seconds=0.05)

    async def scenario() -> None:
        app = create_app(settings)
        async with app.router.lifespan_context(app):
            uploads = [Upload(app) for _ in range(8)]
            for upload in uploads:
                upload.send(bytes(100_000))
            assert await asyncio.gather(*(upload.call() for upload in uploads)) == [408] * 8
            assert b"at 10000 bytes per second, measured over 0.05 s" in uploads[0].answer[1]["body"]
            assert app.state.pipeline.admission.bytes == 0

    asyncio.run(asyncio.wait_for(scenario(), 300))


def test_large_uploads_that_stall_leave_room_for_others(tmp_path: Path) -> None:
    """Eight bodies of 32 MiB that stop before their end, with the default limits of bytes."""
    publish_identity(tmp_path)
    settings = Settings(
        repository=tmp_path,
        threads=1,
        upload_window_seconds=600.0,
        body_timeout_seconds=600.0,
        default_deadline_ms=600_000,
        max_deadline_ms=600_000,
    )

    async def scenario() -> None:
        app = create_app(settings)
        async with app.router.lifespan_context(app):
            admission, piece = app.state.pipeline.admission, bytes(1 << 20)
            uploads = [Upload(app) for _ in range(8)]
            tasks = [asyncio.create_task(upload.call()) for upload in uploads]
            for _ in range(31):
                for upload in uploads:
                    upload.send(piece)
            await until(lambda: admission.bytes >= 180 << 20)
            assert admission.bytes <= 192 << 20
            ordinary = Upload(app)
            ordinary.send(picture(1), last=True)
            assert await ordinary.call() == 200
            declared = Upload(app, length=32 << 20)
            assert await declared.call() == 429, "what could not be held to its end is refused before it is sent"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert admission.bytes == 0

    asyncio.run(asyncio.wait_for(scenario(), 300))
