"""The front's process: a real Envoy before stand-ins of workers that say whether they are ready."""

import asyncio
import contextlib
from pathlib import Path

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
        self.socket, self.ready = socket, ready

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):  # the front closes the connection
            while await reader.readuntil(b"\r\n\r\n"):
                status = b"200 OK" if self.ready else b"503 Service Unavailable"
                writer.write(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status)
        writer.close()

    async def start(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self.answer, self.socket)


async def until_healthy(front: Front, *wanted: StandIn) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await front.healthy() != {one.socket for one in wanted}:  # noqa: ASYNC110 (another process changes it)
            await asyncio.sleep(0.02)


def test_a_worker_is_healthy_once_it_has_told_the_front_that_it_is_ready(tmp_path: Path) -> None:
    async def scenario() -> None:
        assert PROGRAM
        token, settings = "token", Settings(port=free_port())
        front = Front(PROGRAM, settings, tmp_path, workers=2, cores=1, token=token, connections=100)
        assert await front.healthy() == set()
        one, other = (StandIn(tmp_path / name, ready=name == "one") for name in ("one", "other"))
        listening = [await one.start()]
        front.check()
        front.publish([one.socket])
        await front.start()
        try:
            await until_healthy(front, one)
            listening.append(await other.start())
            front.publish([one.socket, other.socket])
            await asyncio.sleep(1.5)  # longer than between two of its questions
            assert await front.healthy() == {one.socket}
            other.ready = True
            await until_healthy(front, one, other)
            front.publish([other.socket])
            await until_healthy(front, other)
        finally:
            await front.stop()
            for server in listening:
                server.close()

    asyncio.run(scenario())
