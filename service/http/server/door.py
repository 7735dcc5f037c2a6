"""Under pressure, a new connection's request may be refused before the connection gets a transport.

A transport and its protocol cost more than all the rest of a refusal. So while the service is under pressure, whatever
a client has sent by the time its connection is accepted is read first. If that is one whole request, and its head alone
is reason to refuse it, it is answered, and the connection closed. Everything else takes the ordinary path.
"""

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from uvicorn.server import ServerState

from service.http.refusal import CLOSE, Refuse
from service.http.server.connections import ConnectionLimits, Connections
from service.http.server.parser import Head, Parser, Refused

_READ_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Taken:
    """What was read from a connection that takes the ordinary path."""

    data: bytes = b""
    judged: bool = False
    """Whether its first request is known not to be refused."""


NOTHING: Final = Taken()


class Door:
    """Takes connections that were just accepted."""

    def __init__(
        self, connections: Connections, server_state: ServerState, refuse: Refuse, pressed: Callable[[], bool]
    ) -> None:
        self._connections, self._server_state, self._refuse, self._pressed = connections, server_state, refuse, pressed

    def take(self, connection: socket.socket) -> Taken | None:
        """What was read from the connection; None if it was answered and closed."""
        if not self._pressed():
            return NOTHING
        try:
            data = connection.recv(_READ_BYTES)
        except OSError:  # nothing is there yet, or the client has left
            return NOTHING
        head = _head_of(data, self._connections.limits)
        if head is None:
            return Taken(data)
        head.scope["state"] = {"first_byte_at": time.perf_counter()}
        if (refusal := self._refuse(head.scope)) is None:
            return Taken(data, judged=True)
        default_headers = self._connections.lines_of(self._server_state.default_headers)
        with suppress(OSError):  # the client has left
            connection.send(refusal.bytes(default_headers, CLOSE))
        connection.close()
        self._connections.count_refused()
        return None


def _head_of(data: bytes, limits: ConnectionLimits) -> Head | None:
    """The head of the request if `data` is exactly one whole request, else None."""
    request = _Request()
    parser = Parser(limits, request)
    try:
        parser.feed(data)
    except Refused:
        return None
    finally:
        parser.close()
    return request.found if request.whole else None


class _Request:
    """Takes one request from a parser."""

    def __init__(self) -> None:
        self.found: Head | None = None
        self.whole = False

    def begin(self) -> None:
        if self.found:
            raise Refused(None)

    def head(self, head: Head) -> None:
        self.found = head

    def body(self, data: bytes) -> None:
        pass

    def complete(self) -> None:
        self.whole = True
