"""Listening sockets: what waits at them is accepted, and how listening ends."""

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from service.http.server import listening
from service.http.server.listening import Listener, stop_listening


class Peer(asyncio.Protocol):
    """Closes its connection at the first byte, once it has told somebody."""

    def __init__(self, tell: Callable[[], object]) -> None:
        self._tell = tell

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._tell()
        self._transport.close()


class OutOfDescriptors:
    """A listening socket that has no descriptor for a connection the first two times."""

    def __init__(self, own: socket.socket) -> None:
        self._own, self.refusals = own, 2

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def accept(self) -> tuple[socket.socket, Any]:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self._own.accept()


def listener(room: int = 1000) -> Listener:
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    return Listener(listening, lambda _: asyncio.Protocol(), room=lambda: room)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("room", [1000, 3, 0])
def test_all_connections_that_wait_are_accepted_in_one_turn_of_the_loop(run: Callable[..., int], room: int) -> None:
    """libuv accepts one: the others would wait where nobody sees them. But no more than there are descriptors for."""

    async def accepted_before_the_first_is_read() -> int:
        found, made = listener(room), list[Peer]()
        first: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def tell() -> None:
            if not first.done():
                first.set_result(len(made))

        def accept(_: socket.socket) -> Peer:
            made.append(Peer(tell))
            return made[-1]

        found.protocol = accept
        clients = [socket.create_connection(found.socket.getsockname()) for _ in range(40)]
        for client in clients:
            client.sendall(b"x")
        count = await asyncio.wait_for(first, 60)
        for client in clients:
            client.close()
        found.close()
        return count

    count = run(accepted_before_the_first_is_read())
    assert count == 40 if room == 1000 else count < 20


def test_a_fault_before_the_connection_is_made_closes_it() -> None:
    async def fail() -> bytes:
        found = listener()

        def fault(_: socket.socket) -> asyncio.Protocol:
            raise ValueError("planted")

        found.protocol = fault
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        reader, writer = await asyncio.open_connection(*found.socket.getsockname())
        said = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        found.close()
        return said

    assert asyncio.run(fail()) == b""


def test_without_a_descriptor_it_pauses_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_PAUSE_SECONDS", 0.01)

    async def accept_after_all() -> None:
        found, read = listener(), asyncio.get_running_loop().create_future()
        found.protocol = lambda _: Peer(lambda: read.set_result(None))
        full = OutOfDescriptors(found.socket)
        found.socket = full  # type: ignore[assignment]
        with socket.create_connection(full.getsockname()) as client:
            client.sendall(b"x")
            await asyncio.wait_for(read, 60)
        assert full.refusals == 0
        found.close()

    asyncio.run(accept_after_all())


def test_listening_ends_although_nobody_accepts_what_waits() -> None:
    """As without a free descriptor."""

    async def end() -> None:
        listener = Listener(socket.create_server(("127.0.0.1", 0)), lambda _: None)
        listener.loop.remove_reader(listener.socket)
        with socket.create_connection(listener.socket.getsockname()):
            async with asyncio.timeout(60):
                await stop_listening([listener])
        assert listener.socket.fileno() == -1

    asyncio.run(end())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_connections_that_wait_when_listening_ends_are_accepted(run: Callable[..., None]) -> None:
    """The system would reset them."""

    async def scenario() -> None:
        made: list[asyncio.Protocol] = []

        def protocol(_: socket.socket) -> asyncio.Protocol:
            made.append(asyncio.Protocol())
            return made[-1]

        found = Listener(socket.create_server(("127.0.0.1", 0), backlog=64), protocol)
        # Without a turn of the loop in between.
        clients = [socket.create_connection(found.socket.getsockname()) for _ in range(40)]
        await stop_listening([found])
        for client in clients:
            client.close()
        assert len(made) == 40

    run(scenario())
