"""One request and its answer, between the application (ASGI) and its connection."""

import asyncio
from collections.abc import Iterable
from typing import Final, Protocol

import structlog
from starlette.types import ASGIApp, Message, Scope

from service.http import security_headers
from service.http.client import Client
from service.http.refusal import CLOSE, Refusal, header_lines, status_line

log = structlog.get_logger()

_BUFFERED_BYTES: Final = 64 * 1024
"""Bytes of a body that wait for the application; beyond them the client has to wait."""

_WITHOUT_BODY: Final = (204, 304)
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
SECURITY_LINES: Final = header_lines(security_headers.API)
"""For answers that are not the application's, which adds them to its own."""


class Wire(Protocol):
    """What a request needs from its connection."""

    write_blocked: bool
    """Whether the client has yet to read what was written."""

    @property
    def default_headers(self) -> bytes:
        """Lines of every answer."""

    @property
    def kept_headers(self) -> bytes:
        """The last lines of the head of an answer after which the connection stays open."""

    def write(self, data: bytes) -> None:
        """Send bytes."""

    async def writable(self) -> None:
        """Wait until the client has read what was written, or has left."""

    def keeps_open(self, cycle: "Cycle") -> bool:
        """Whether the connection may stay open after the answer to `cycle`."""

    def answered(self, cycle: "Cycle") -> None:
        """The answer is complete."""

    def abort(self, reason: str) -> None:
        """Close the connection at once."""

    def pause_reading(self) -> None:
        """Make the client wait with its body."""

    def resume_reading(self) -> None:
        """Take more of the body."""


class Cycle:
    """`receive` and `send` of one request; its connection feeds it the body, buffering at most 64 KiB and one read."""

    __slots__ = (
        "_bodiless",
        "_buffered",
        "_chunked",
        "_chunks",
        "_end_reported",
        "_event",
        "_head",
        "_left",
        "_started",
        "_wire",
        "body_complete",
        "client",
        "complete",
        "expects_continue",
        "keep_alive",
        "received",
        "scope",
    )

    def __init__(self, wire: Wire, scope: Scope, *, keep_alive: bool, expects_continue: bool) -> None:
        self._wire, self.scope = wire, scope
        self.keep_alive, self.expects_continue = keep_alive, expects_continue
        self.received = 0
        self.body_complete = self.complete = False
        self.client = Client()
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._end_reported = self._started = self._chunked = self._bodiless = False
        self._head: bytes | None = None
        self._left: int | None = None
        self._event: asyncio.Event | None = None

    @property
    def sent(self) -> bool:
        """Whether a part of the answer is on its way."""
        return self._started and self._head is None

    @property
    def probe(self) -> bytes:
        """Bytes that mean nothing to a client reading its answer, to be sent at most once; empty if there are none."""
        if not self.sent:
            return CONTINUE if self.scope["http_version"] == "1.1" else b""
        # The size of the next chunk may begin with a zero, even that of the last.
        return b"0" if self._chunked and not self.complete else b""

    async def run(self, app: ASGIApp) -> None:
        """Let the application answer; a bare 500 is the last resort."""
        try:
            await app(self.scope, self.receive, self.send)
        except Exception:
            # The application has answered and logged its own errors, even if it raises them again.
            if not self.complete and not self.client.left:
                log.exception("the application failed before its answer was complete")
        if self.complete or self.client.left:
            return
        if self.sent:
            self._wire.abort("incomplete-answer")
            return
        self._started, self._left, self._chunked = False, None, False
        text = b"Internal Server Error"
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(text)), (b"connection", b"close")]
        self._start(500, [*headers, *security_headers.API])
        self._send_body(text, more=False)

    def refuse(self, refusal: Refusal) -> None:
        """Answer in place of the application."""
        wire = self._wire
        self.keep_alive = self.keep_alive and wire.keeps_open(self)
        wire.write(refusal.bytes(wire.default_headers, wire.kept_headers if self.keep_alive else CLOSE))
        self._started = self.complete = True
        wire.answered(self)

    # Called by the connection.

    def feed(self, body: bytes) -> None:
        """A piece of the body has arrived."""
        self.received += len(body)
        if self.complete:
            return
        self._chunks.append(body)
        self._buffered += len(body)
        if self._buffered > _BUFFERED_BYTES:
            self._wire.pause_reading()
        self._wake()

    def end_body(self) -> None:
        """The body is complete."""
        self.body_complete = True
        self._wake()

    def disconnect(self) -> None:
        """The client has left: nobody reads the answer."""
        self.client.leave()
        self._wake()

    def _wake(self) -> None:
        if self._event:
            self._event.set()

    # ASGI.

    async def receive(self) -> Message:
        """The next piece of the body; after its end `http.disconnect`, once the client has left or has its answer."""
        if self.expects_continue:
            self.expects_continue = False
            if not (self._chunks or self._started or self.client.left):
                self._wire.write(CONTINUE)
        while not (self.client.left or self.complete):
            if self._chunks or (self.body_complete and not self._end_reported):
                return self._next_piece()
            if self._event is None:
                self._event = asyncio.Event()
            self._event.clear()
            await self._event.wait()
        return {"type": "http.disconnect"}

    def _next_piece(self) -> Message:
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        if chunks:
            self._chunks = []
            if self._buffered > _BUFFERED_BYTES:
                self._wire.resume_reading()
            self._buffered = 0
        self._end_reported = self.body_complete
        return {"type": "http.request", "body": body, "more_body": not self.body_complete}

    async def send(self, message: Message) -> None:
        """Send the head, or a piece of the body. The head is sent with the first piece."""
        if self._wire.write_blocked:
            await self._wire.writable()
        if self.client.left:
            return
        kind = message["type"]
        if not self._started and kind == "http.response.start":
            self._start(message["status"], message.get("headers", ()))
        elif self._started and not self.complete and kind == "http.response.body":
            self._send_body(message.get("body", b""), more=message.get("more_body", False))
        else:
            raise RuntimeError(f"unexpected ASGI message {kind!r}")

    def _start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        length: int | None = None
        lines: list[bytes] = []
        for name, value in headers:
            key = name.lower()
            if key == b"content-length":
                length = int(value)
            elif key == b"connection":
                # Values other than `close` are up to the connection.
                self.keep_alive = self.keep_alive and b"close" not in value.lower()
                continue
            elif key == b"transfer-encoding":
                continue
            lines.append(b"%b: %b\r\n" % (key, value))
        block = b"".join(lines)
        if not block.count(b"\n") == block.count(b"\r") == len(lines) or b"\0" in block:
            raise RuntimeError("a header of the answer has a line break or NUL in it")
        self._bodiless = status in _WITHOUT_BODY or self.scope["method"] == "HEAD"
        framing = b""
        if length is None and not self._bodiless:
            if self.scope["http_version"] == "1.0":
                self.keep_alive = False
            else:
                self._chunked, framing = True, b"transfer-encoding: chunked\r\n"
        self._left = 0 if self._bodiless else length
        wire = self._wire
        self.keep_alive = self.keep_alive and wire.keeps_open(self)
        ending = wire.kept_headers if self.keep_alive else CLOSE
        self._head = b"".join((status_line(status), wire.default_headers, block, framing, ending))
        self._started = True

    def _send_body(self, body: bytes, *, more: bool) -> None:
        if self._bodiless:
            body = b""
        if self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("the answer's body does not have the length that its head says")
        elif self._chunked:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"" if more else b"0\r\n\r\n")
        if self._head is not None:
            body, self._head = self._head + body, None
        if body:
            self._wire.write(body)
        if not more:
            self.complete = True
            self._wake()
            self._wire.answered(self)
