"""A client that knows how far each request got: not connected, not wholly sent, or sent and not wholly answered."""

import asyncio
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import cast

import httptools

from loadtests.faults.numbers import NumberedRequest, id_in, numbers_in

KEEP_SECONDS = 3.0
"""An idle connection is reused within this time, which should be less than servers keep one."""
_IDLE_CONNECTIONS = 64


class Outcome(StrEnum):
    """What became of a request."""

    ANSWERED = "answered"
    """With 200 and with its own number."""
    REFUSED = "refused"
    """With 429 or 503, and the time after which to try again."""
    FAILED = "failed"
    """With any other status, or with 200 and no number."""
    UNCONNECTED = "unconnected"
    """No connection was accepted, so nothing was sent."""
    UNSENT = "unsent"
    """The connection broke before the request was wholly sent, without an answer."""
    LOST = "lost"
    """Sent wholly on an accepted connection, and not answered wholly."""
    SWAPPED = "swapped"
    """Answered with the number of another image, or the id of another request."""


@dataclass(slots=True)
class Reply:
    """A whole answer; names of headers are lower-case."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Unanswered(Exception):
    """No whole answer came; `outcome` says how far the request had got."""

    def __init__(self, outcome: Outcome, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome


class Client:
    """Sends requests to one address. Kept connections are reused, the last one first."""

    def __init__(self, host: str, port: int, *, answer_seconds: float) -> None:
        """`answer_seconds`: a request without an answer after this time counts as not answered."""
        self._host, self._port, self._answer_seconds = host, port, answer_seconds
        self._idle: list[_Connection] = []

    async def ask(self, request: bytes, *, keep: bool) -> Reply:
        """Send a request on a kept connection, or on a new one that is closed afterwards. Raises Unanswered."""
        connection = self._kept() if keep else None
        limit = time.monotonic() + self._answer_seconds
        connection = connection or await self._connect()
        try:
            async with asyncio.timeout(limit - time.monotonic()):
                reply = await connection.ask(request)
        except TimeoutError:
            raise Unanswered(connection.reached, f"no answer within {self._answer_seconds:g} s") from None
        except ConnectionError as error:
            raise Unanswered(connection.reached, str(error)) from error
        finally:
            if not (keep and connection.reusable and len(self._idle) < _IDLE_CONNECTIONS):
                connection.abort()
        if not connection.aborted:
            self._idle.append(connection)
        return reply

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().abort()

    def _kept(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and time.monotonic() - connection.answered_at < KEEP_SECONDS:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._answer_seconds):
                _, protocol = await loop.create_connection(_Connection, self._host, self._port)
        except (OSError, TimeoutError) as error:
            raise Unanswered(Outcome.UNCONNECTED, f"no connection: {error!r}") from error
        return protocol


class _Connection(asyncio.Protocol):
    """One request at a time; the parser calls its `on_` methods."""

    def __init__(self) -> None:
        self.answered_at = 0.0
        self.aborted = False
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[Reply] | None = None
        self._reply = Reply(0)
        self._whole, self._keeps = False, False
        self._unsent = False
        self._body = bytearray()

    @property
    def reached(self) -> Outcome:
        """The outcome of a request that gets no answer now."""
        return Outcome.UNSENT if self._unsent else Outcome.LOST

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent."""
        return self._whole and self._keeps and not self.aborted

    async def ask(self, request: bytes) -> Reply:
        """Send, and wait for the answer. Raises ConnectionError."""
        if self._transport is None or self.aborted:
            raise ConnectionResetError("the connection is closed")
        self._answer = asyncio.get_running_loop().create_future()
        self._whole = False
        self._transport.write(request)
        return await self._answer

    def abort(self) -> None:
        """Close the connection at once."""
        self.aborted = True
        if self._transport:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        # So that `pause_writing` tells whether anything is still unsent.
        self._transport.set_write_buffer_limits(high=0)

    def pause_writing(self) -> None:
        self._unsent = True

    def resume_writing(self) -> None:
        self._unsent = False

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}")

    def eof_received(self) -> None:
        self._end("closed by the server")

    def connection_lost(self, error: Exception | None) -> None:
        self._end(str(error or "closed by the server"))

    def on_message_begin(self) -> None:
        self._reply, self._body = Reply(0), bytearray()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._reply.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if (status := self._parser.get_status_code()) < 200:
            return
        self._reply.status, self._reply.body = status, bytes(self._body)
        self._whole, self._keeps = True, self._parser.should_keep_alive()
        self.answered_at = time.monotonic()
        if self._answer and not self._answer.done():
            self._answer.set_result(self._reply)

    def _end(self, why: str) -> None:
        self.aborted = True
        if self._answer and not self._answer.done():
            self._answer.set_exception(ConnectionResetError(why))


def judge(request: NumberedRequest, reply: Reply) -> Outcome:
    """The outcome of a request that was answered."""
    if reply.status != 200:
        again = reply.status in (429, 503) and "retry-after" in reply.headers
        return Outcome.REFUSED if again else Outcome.FAILED
    try:
        numbers = numbers_in(request.form, reply.headers, reply.body)
    except ValueError:
        return Outcome.FAILED
    same = id_in(request.form, reply.headers, reply.body) == str(request.numbers[0])
    return Outcome.ANSWERED if numbers == request.numbers and same else Outcome.SWAPPED
