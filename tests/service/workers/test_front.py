"""The front's process: a real Envoy before stand-ins of workers that say whether they are ready."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from loadtests.experiment.server import free_port
from service.settings import Settings
from service.workers.envoy import find_envoy
from service.workers.front import Front
from tests.processes import PATIENCE_SECONDS

PROGRAM = find_envoy()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs the extra `workers`")


class StandIn:
    """Answers the front's question whether it is ready."""

    def __init__(self, socket: Path, *, ready: bool) -> None:
        self.socket, self.ready, self.asked = socket, ready, 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self.answer, self.socket)

    def stop(self) -> None:
        """Like a process that dies: nobody listens, and what is connected is closed."""
        self._server.close()
        while self._writers:
            self._writers.pop().transport.abort()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # the front closes the connection
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.asked += 1
                if b"content-length: 7" in head.lower():
                    await reader.readexactly(7)
                status = b"200 OK" if self.ready else b"503 Service Unavailable"
                writer.write(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status)
        self._writers.discard(writer)
        writer.close()


async def until_healthy(front: Front, *wanted: StandIn) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await front.healthy() != {one.socket for one in wanted}:  # noqa: ASYNC110 (another process changes it)
            await asyncio.sleep(0.02)


def scenario(tmp_path: Path, play: Callable[[Front, StandIn, StandIn, str], Awaitable[None]]) -> None:
    """Play with a front that has the first of two stand-ins; the second one is not ready yet."""

    async def played() -> None:
        assert PROGRAM
        token, settings = "token", Settings(port=free_port())
        front = Front(PROGRAM, settings, tmp_path, workers=2, cores=1, token=token, connections=100)
        assert await front.healthy() == set()
        one, other = (StandIn(tmp_path / name, ready=name == "one") for name in ("one", "other"))
        await one.start()
        await other.start()
        front.check()
        front.publish([one.socket])
        await front.start()
        try:
            await until_healthy(front, one)
            await play(front, one, other, f"http://127.0.0.1:{settings.port}/v1/classify")
        finally:
            await front.stop()
            one.stop()
            other.stop()

    asyncio.run(played())


def test_a_worker_is_healthy_once_it_has_told_the_front_that_it_is_ready(tmp_path: Path) -> None:
    async def play(front: Front, one: StandIn, other: StandIn, _: str) -> None:
        front.publish([one.socket, other.socket])
        async with asyncio.timeout(PATIENCE_SECONDS):
            while other.asked < 3:
                assert other.socket not in await front.healthy()
                await asyncio.sleep(0.02)
        assert other.socket not in await front.healthy()
        await until_healthy(front, one)
        other.ready = True
        await until_healthy(front, one, other)
        front.publish([other.socket])
        await until_healthy(front, other)

    scenario(tmp_path, play)


def test_a_healthy_worker_gets_requests_at_once(tmp_path: Path) -> None:
    async def play(front: Front, one: StandIn, other: StandIn, url: str) -> None:
        other.ready = True
        front.publish([one.socket, other.socket])
        await until_healthy(front, one, other)
        one.stop()
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS) as client:
            answers = [await client.post(url, content=b"picture") for _ in range(20)]
        assert [answer.status_code for answer in answers] == [200] * 20

    scenario(tmp_path, play)
