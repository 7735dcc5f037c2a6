"""A server of our connections on a socket of its own, in a thread, around a small application."""

import asyncio
import gc
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from starlette.types import Receive, Scope, Send

from service.http.server.connections import ConnectionLimits
from service.http.server.server import Server
from service.metrics import Metrics
from tests.processes import PATIENCE_SECONDS, wait_until

LIMITS: dict[str, Any] = {
    "max_connections": 1000,
    "max_head_bytes": 4096,
    "max_url_bytes": 1024,
    "max_headers": 30,
    "keep_alive_seconds": 1000.0,
    "head_timeout_seconds": 1000.0,
    "write_timeout_seconds": 1000.0,
}


@dataclass
class Echo:
    """Answers with what it was asked: method, path, length of the body. Paths make it behave otherwise."""

    scopes: list[Scope] = field(default_factory=list)
    disconnected: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError("no lifespan")
        self.scopes.append(scope)
        path, body = scope["path"], b""
        if path != "/unread":
            while (message := await receive())["type"] == "http.request":
                body += message["body"]
                if not message["more_body"]:
                    break
        if path == "/fail":
            raise ValueError("a fault of the application")
        if path == "/thread":
            asyncio.get_running_loop().run_in_executor(None, self.released.wait, PATIENCE_SECONDS)
        if path == "/block":
            self.released.wait(PATIENCE_SECONDS)  # the event loop stands still
        if path == "/trickle":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"first ", "more_body": True})
            await self._wait(path, receive)
            await send({"type": "http.response.body", "body": b"last"})
            return
        if path == "/wait":
            await self._wait(path, receive)
        answer = json.dumps({"method": scope["method"], "path": path, "body": len(body)}).encode()
        if path == "/large":
            answer = b"x" * 50_000_000
        headers = [] if path == "/stream" else [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _wait(self, path: str, receive: Receive) -> None:
        """Until it is released, or the client has left."""
        while not self.released.is_set() and path not in self.disconnected:
            try:
                message = await asyncio.wait_for(receive(), 0.01)
            except TimeoutError:
                continue
            if message["type"] == "http.disconnect":
                self.disconnected.append(path)


@dataclass
class Bench:
    """A running server."""

    app: Echo
    server: Server
    metrics: Metrics
    left: list[int]

    @property
    def port(self) -> int:
        return int(self.server.listeners[0].socket.getsockname()[1])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECONDS)

    def ask(self, *pieces: bytes) -> list[tuple[int, dict[str, str], bytes]]:
        """Send pieces, and read all answers until the server closes: status, headers, body."""
        with self.connect() as client:
            for piece in pieces:
                client.sendall(piece)
            return answers(client)

    def closed(self, reason: str) -> float:
        """How many connections were closed for a reason."""
        labels = {"reason": reason}
        return self.metrics.registry.get_sample_value("stridevit_connections_closed_total", labels) or 0.0


@contextmanager
def serving(**limits: Any) -> Iterator[Bench]:
    """A server with `limits`, until the block ends."""
    app, metrics, left = Echo(), Metrics(), list[int]()
    pipeline: Any = SimpleNamespace(
        ready=True,
        metrics=metrics,
        registry=SimpleNamespace(close=lambda: None),
        scheduler=SimpleNamespace(abandoned=False),
    )
    loop = limits.pop("loop", "auto")
    refuse, pressed = limits.pop("refuse", lambda _: None), limits.pop("pressed", lambda: False)
    delay, graceful = limits.pop("delay_seconds", 0.0), limits.pop("graceful_seconds", 1000.0)
    close = limits.pop("close_seconds", 1000.0)
    server = Server(
        app,
        pipeline,
        ConnectionLimits(**{**LIMITS, **limits}),
        refuse=refuse,
        pressed=pressed,
        host="127.0.0.1",
        port=0,
        delay_seconds=delay,
        graceful_seconds=graceful,
        leave=left.append,
    )
    server.config.loop = loop
    # The real limits are meant for misbehaving clients and threads, not for tests on a busy machine.
    server.connections.lingering.seconds = 1000.0
    server.fuse.interval = close
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        # Not `started`: uvicorn sets it before our listeners take over.
        wait_until(lambda: bool(server.listeners))
        yield Bench(app, server, metrics, left)
    finally:
        app.released.set()
        server.should_exit = True
        thread.join(PATIENCE_SECONDS)
        server.fuse.cancel()
        gc.unfreeze()
        assert not thread.is_alive()


def answers(client: socket.socket) -> list[tuple[int, dict[str, str], bytes]]:
    """All answers on a connection until its end."""
    received = b"".join(iter(lambda: client.recv(1 << 20), b""))
    found, stream = [], io.BytesIO(received)
    while stream.tell() < len(received):
        answer = http.client.HTTPResponse(SimpleNamespace(makefile=lambda _: _Unclosed(stream)))  # type: ignore[arg-type]
        answer.begin()
        found.append((answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()))
    return found


def one_answer(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """The next answer on a connection that stays open."""
    answer = http.client.HTTPResponse(client)
    answer.begin()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


class _Unclosed(io.BufferedReader):
    """A reader whose end leaves the stream open for the next answer."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, buffer_size=1)
        self._stream = stream

    def close(self) -> None:
        pass


def pause() -> None:
    """Let the server read what was sent as a piece of its own; nothing depends on it."""
    time.sleep(0.02)
