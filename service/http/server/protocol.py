"""One connection.

What a client can make the service hold, and for how long, is bounded:

- a head in its size (see `parser`: 431, 414) and its time, `head_timeout_seconds` (408);
- an idle connection by `keep_alive_seconds`, an answer that is not read by `write_timeout_seconds`;
- pipelined requests by MAX_PIPELINED, and by reading no more while one waits;
- a body that nobody reads any more by DISCARDED_BYTES, and LINGER_SECONDS in time;
- the number of connections by `max_connections` (503).

The body and the answer of a request are bounded by the application, and by `cycle` as they pass through it.
"""

import asyncio
import json
import socket
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.server import ServerState

from service.errors import HeadTooSlow, RequestError, TooManyConnections
from service.http.problems import OF_OTHERS, problem
from service.http.refusal import CLOSE, Refusal, Refuse
from service.http.server import sockets
from service.http.server.connections import Connections, Wait
from service.http.server.cycle import SECURITY_LINES, Cycle
from service.http.server.door import NOTHING, Taken
from service.http.server.parser import Head, Parser, Refused

_OF_OTHERS: Final = tuple(prefix.encode() for prefix in OF_OTHERS)
PROBES: Final = ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")
"""Paths that are answered even while all connections are in use."""
UNIX_PEER: Final = "unix"
"""The client's address on a UNIX socket: `forwarded_allow_ips` may name it."""
MAX_PIPELINED: Final = 32
"""Requests that may wait for the answer to an earlier one of their connection; what follows them is not read."""
DISCARDED_BYTES: Final = 1024 * 1024
"""Longest rest of a body that is read and discarded to keep the connection; with a longer one it is closed."""


class HttpProtocol(asyncio.Protocol):
    """An HTTP/1.1 connection. uvicorn calls it with its configuration and state."""

    def __init__(
        self,
        *,
        connections: Connections,
        refuse: Refuse,
        taken: Taken = NOTHING,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._app: ASGIApp = config.loaded_app
        self._connections, self._server_state, self._app_state = connections, server_state, app_state
        self._refusal_of, self._taken = refuse, taken
        self._loop = _loop or asyncio.get_running_loop()
        self._parser = Parser(connections.limits, self)
        # The request being received, the one being answered by the application, and those waiting for that one.
        self._reading: Cycle | None = None
        self._answering: Cycle | None = None
        self._pipelined: deque[Cycle] = deque()
        self._content_length: int | None = 0
        self._refusal: RequestError | None = None
        self._refused: Refusal | None = None
        """The answer to `_answering` if that is refused on its head alone."""
        # No more requests are taken; no more are answered; the client has closed its side.
        self._input_ended = self._output_ended = self._at_eof = False
        self._serves_all = self._reads = True
        self._spared = False
        self._reason = "client"
        self._wait: Wait | None = None
        self.write_blocked = False
        self._writable: asyncio.Event | None = None

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._socket: socket.socket = transport.get_extra_info("socket")
        # Whatever the socket's own buffer does not take counts as unread.
        self._transport.set_write_buffer_limits(high=0)
        client, server = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        if self._socket.family == socket.AF_UNIX:
            self._addresses: dict[str, Any] = {"client": (UNIX_PEER, 0), "server": (server, None)}
        else:
            self._addresses = {"client": client and tuple(client[:2]), "server": server and tuple(server[:2])}
        self._serves_all = self._connections.add(self)
        self._settle()
        if self._taken.data:
            # Once the transport reads, as it cannot be paused before. What it reads may arrive first.
            self._loop.call_soon(self.data_received, b"")

    def data_received(self, data: bytes) -> None:
        if self._input_ended:
            return
        self._read_at = time.perf_counter()
        if self._taken.data:
            data, self._taken = self._taken.data + data, replace(self._taken, data=b"")
        try:
            self._parser.feed(data)
        except Refused as refused:
            if not self._input_ended:  # what follows `Connection: close` is not looked at
                self._refuse(refused.error)
        if self._refused and self._answering:
            # Only now, as by now its body has usually arrived: then there is nothing to wait for.
            refusal, self._refused = self._refused, None
            self._answering.refuse(refusal)
        self._settle()

    def eof_received(self) -> bool:
        """Whether to keep the connection: only if requests that arrived completely have not been answered."""
        if self._taken.data:
            self.data_received(b"")
        self._at_eof = self._input_ended = True
        if self._output_ended or self._reading or not self._answering or self._transport.is_closing():
            return False
        # The client has closed its side, or both. In the latter case its system rejects the next bytes: send some.
        if probe := self._answering.probe:
            self._transport.write(probe)
        self._settle()
        return sockets.peer_listens(self._socket)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._input_ended = True
        self._enter(None)
        self._connections.remove(self, self._reason)
        for cycle in (self._reading, self._answering, *self._pipelined):
            if cycle and not cycle.complete:
                cycle.disconnect()
        self._pipelined.clear()
        # The parser refers to this object: without the reference cycle, both are freed at once.
        self._reading = self._answering = None
        self._parser.close()
        self.resume_writing()

    def pause_writing(self) -> None:
        self.write_blocked = True
        self._settle()

    def resume_writing(self) -> None:
        self.write_blocked = False
        if self._writable:
            self._writable.set()
        self._settle()

    # The parser's side.

    def begin(self) -> None:
        if len(self._pipelined) >= MAX_PIPELINED:
            raise Refused(None)
        self._first_byte_at, self._spared = self._read_at, False

    def head(self, head: Head) -> None:
        scope = head.scope
        if not self._serves_all and scope["path"] not in PROBES:
            raise Refused(TooManyConnections("all connections are in use: retry"))
        state: dict[str, Any] = {**self._app_state, "first_byte_at": self._first_byte_at}
        scope.update(self._addresses, state=state)
        cycle = Cycle(self, scope, keep_alive=head.keep_alive, expects_continue=head.expects_continue)
        state["client"] = cycle.client
        self._reading, self._content_length = cycle, head.content_length
        if self._answering:
            self._pipelined.append(cycle)
            self.pause_reading()
        elif not self._taken.judged and (refusal := self._refusal_of(scope)):
            self._answering, self._refused = cycle, refusal
        else:
            self._taken, state["judged"] = NOTHING, True
            self._answer(cycle)

    def body(self, data: bytes) -> None:
        if self._reading:
            self._reading.feed(data)

    def complete(self) -> None:
        cycle, self._reading = self._reading, None
        if cycle:
            self._input_ended = self._input_ended or not cycle.keep_alive
            cycle.end_body()

    # The requests' side.

    @property
    def default_headers(self) -> bytes:
        return self._connections.lines_of(self._server_state.default_headers)

    @property
    def kept_headers(self) -> bytes:
        return self._connections.kept_headers

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    async def writable(self) -> None:
        while self.write_blocked:
            self._writable = self._writable or asyncio.Event()
            self._writable.clear()
            await self._writable.wait()

    def keeps_open(self, cycle: Cycle) -> bool:
        if self._pipelined or self._refusal:
            return True
        if self._input_ended or self._connections.draining or not self._serves_all:
            return False
        if cycle.body_complete:
            return True
        # The application may never read the rest of the body: wait for it only if it is sure to come, and short.
        length = self._content_length
        return not cycle.expects_continue and length is not None and length - cycle.received <= DISCARDED_BYTES

    def answered(self, cycle: Cycle) -> None:
        self._answering = None
        if self._refusal and not self._pipelined:
            self._answer_refusal(self._refusal)
        elif not self._refusal and (not cycle.keep_alive or (self._at_eof and not self._pipelined)):
            self.end("answered")
        else:
            if self._pipelined:
                self._answer(self._pipelined.popleft())
            if not self._pipelined:
                self.resume_reading()
            self._settle()

    def pause_reading(self) -> None:
        if self._reads and not self._at_eof:
            self._reads = False
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not (self._reads or self._pipelined or self._at_eof or self._transport.is_closing()):
            self._reads = True
            self._transport.resume_reading()

    def _answer(self, cycle: Cycle) -> None:
        self._answering = cycle
        task = self._loop.create_task(cycle.run(self._app))
        self._server_state.tasks.add(task)
        task.add_done_callback(self._server_state.tasks.discard)

    def _refuse(self, error: RequestError | None) -> None:
        """Read no more, and after the answers to earlier requests end with that to `error`, if any."""
        self._input_ended = True
        broken, self._reading = self._reading, None
        if broken and broken is self._answering:
            # Its body is damaged: let the application know that nothing will follow.
            self._answering = None
            broken.disconnect()
            if broken.sent:
                self.abort("malformed")
                return
        elif broken and broken in self._pipelined:
            self._pipelined.remove(broken)
        self._refusal = error
        if self._answering is None:
            if error:
                self._answer_refusal(error)
            else:
                self.end("pipelined")

    def _answer_refusal(self, error: RequestError) -> None:
        self._connections.say("request refused by its connection", error.code)
        kind, members = "problem+json", problem(error)
        if self._parser.path.startswith(_OF_OTHERS):
            kind, members = "json", {"error": str(error)}
        body = json.dumps(members).encode()
        head = f"content-type: application/{kind}\r\ncontent-length: {len(body)}\r\n".encode()
        refusal = Refusal(error.status, SECURITY_LINES + head, body)
        self._transport.write(refusal.bytes(self.default_headers, CLOSE))
        self.end(error.code)

    # The side of `Connections`, which calls these.

    def expire(self, reason: str) -> None:
        """The connection has waited too long in its present state."""
        if reason == "slow-head":
            seconds = self._connections.limits.head_timeout_seconds
            self._refuse(HeadTooSlow(f"the request's head did not arrive within {seconds:g} s: send it again"))
        elif reason == "full":
            self._refuse(TooManyConnections("all connections are in use: retry"))
        elif reason == "half-closed":
            if sockets.peer_listens(self._socket):
                self._enter(None)
                self._settle()
            else:
                self.abort("client")
        elif reason != "idle":
            self.abort(reason)
        elif self.unused() or self._spared:
            self.end(reason)
        else:
            # A request has arrived that the event loop has not read yet. By the next sweep it will have.
            self._spared = True

    def unused(self) -> bool:
        return not self._taken.data and sockets.nothing_to_read(self._socket)

    def end(self, reason: str) -> None:
        """Answer no more. The client may still send: the connection is closed once the client has closed its side."""
        if self._transport.is_closing() or self._output_ended:
            return
        nothing_follows = self._at_eof or (self._reading is None and self._input_ended and reason == "answered")
        self._input_ended = self._output_ended = True
        self._reason = reason
        if nothing_follows:
            self.close(reason)
        else:
            # If the client has reset the connection, there is nothing to close; the loop reports that next.
            with suppress(OSError):
                self._transport.write_eof()
            self.resume_reading()
            self._settle()

    def close(self, reason: str) -> None:
        self._reason, self._input_ended = reason, True
        self._transport.close()
        self._settle()

    def abort(self, reason: str) -> None:
        self._reason, self._input_ended = reason, True
        self._enter(None)
        self._transport.abort()

    def _settle(self) -> None:
        """Enter the wait that belongs to the present state."""
        connections = self._connections
        wait: Wait | None
        if self.write_blocked:
            wait = connections.unread
        elif self._transport.is_closing():
            wait = None
        elif self._output_ended:
            wait = connections.lingering
        elif self._answering:
            wait = connections.half_closed if self._at_eof else None
        elif self._reading:
            wait = connections.lingering
        elif not self._serves_all:
            wait = connections.beyond
        else:
            wait = connections.heads if self._parser.in_head else connections.idle
        if wait is not self._wait:
            self._enter(wait)

    def _enter(self, wait: Wait | None) -> None:
        if self._wait is not None:
            del self._wait[self]
        self._wait = wait
        if wait is not None:
            wait[self] = self._connections.clock()
