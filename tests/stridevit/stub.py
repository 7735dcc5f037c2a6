"""A real HTTP server whose answers a test writes, for what a real service does only now and then."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import anyio.to_thread
import uvicorn
from starlette.types import Receive, Scope, Send

from tests.processes import PATIENCE_SECONDS

CLASSIFICATION = {
    "model": "m",
    "version": 1,
    "requested": None,
    "results": [{"predictions": [{"index": 0, "label": "cat", "probability": 0.9}], "error": None}],
    "choice": None,
    "timings_ms": {"total": 1.0},
    "request_id": "r1",
}


@dataclass(frozen=True)
class Asked:
    """A request that the stub got."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What it answers, as JSON unless it is bytes."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    between: Callable[[], object] | None = None
    """Called before each byte of the body but the first, each of which is sent by itself."""


def problem(status: int, code: str, **more: Any) -> Reply:
    """An error as the service writes it."""
    body = {"type": f"urn:stridevit:{code}", "title": "", "status": status, "detail": f"this is {code}", "code": code}
    return Reply(status, {**body, "request_id": "r9", **more})


class Stub:
    """Gives its `replies` one after the other, the last one again and again."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[Asked] = []
        self.replies: list[Reply] = [Reply(body=CLASSIFICATION)]
        self.before: Callable[[], object] = lambda: None
        """Called before each answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        query = dict(parse_qsl(scope["query_string"].decode()))
        self.asked.append(Asked(scope["method"], scope["path"], query, headers, body))
        self.before()
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        head = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": head})
        if reply.between:
            for byte in content[:-1]:
                await send({"type": "http.response.body", "body": bytes([byte]), "more_body": True})
                await anyio.to_thread.run_sync(reply.between)
            content = content[-1:]
        await send({"type": "http.response.body", "body": content})


@contextmanager
def stub_server() -> Iterator[Stub]:
    """A stub on a socket of its own until the block ends."""
    stub = Stub()
    config = uvicorn.Config(
        stub, port=0, lifespan="off", log_config=None, ws="none", http="h11", loop="asyncio", date_header=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        stub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield stub
    finally:
        server.should_exit = True
        thread.join()
