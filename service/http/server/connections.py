"""All connections: how many may be open, how long each may wait for what, and which are closed to make room."""

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from service.http.refusal import header_lines
from service.metrics import Metrics
from service.throttle import LogThrottle

log = structlog.get_logger()

RESERVED_FOR_PROBES: Final = 16
"""Connections beyond the limit, on which only probes and /metrics are answered; all else gets 503."""
LINGER_SECONDS: Final = 10.0
"""Seconds that a client has to read its last answer while it still sends: closing at once would destroy the answer."""
_BEYOND_SECONDS: Final = 2.0
"""Seconds that a connection beyond the limit has to send its request."""
_HINT_MARGIN_SECONDS: Final = 2
"""How much longer than `Keep-Alive` says a connection is kept, so that a request sent at the last moment is read."""
_QUIET_SECONDS: Final = 1.0
"""Seconds without a byte after which a connection counts as unused: sooner, a request may still be on its way."""
_SWEEP_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """The limits of connections, as the settings of the same names describe them."""

    max_connections: int
    max_head_bytes: int
    max_url_bytes: int
    max_headers: int
    keep_alive_seconds: float
    head_timeout_seconds: float
    write_timeout_seconds: float


class Connection(Protocol):
    """What `Connections` needs from a connection."""

    def expire(self, reason: str) -> None:
        """It has waited too long."""

    def unused(self) -> bool:
        """Whether no byte waits in its socket to be read."""

    def end(self, reason: str) -> None:
        """Let the client close it: there will be no more answers."""

    def close(self, reason: str) -> None:
        """Close it, once what was written is sent."""

    def abort(self, reason: str) -> None:
        """Close it at once."""


class Wait(OrderedDict[Connection, float]):
    """The connections that wait for one thing, longest wait first, each with the time at which its wait began."""

    def __init__(self, reason: str, seconds: float) -> None:
        """`reason`: why a connection that waits for longer than `seconds` is closed."""
        super().__init__()
        self.reason, self.seconds = reason, seconds


class Connections:
    """All connections of a server. Each enters and leaves the waits itself, and is in one of them at most."""

    def __init__(
        self, limits: ConnectionLimits, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits, self.clock = limits, clock
        self.open: set[Connection] = set()
        self.draining = False
        """From now on every answer is the last one of its connection."""
        self.kept_headers = b"connection: keep-alive\r\nkeep-alive: timeout=%d\r\n\r\n" % max(
            1, limits.keep_alive_seconds - _HINT_MARGIN_SECONDS
        )
        self.idle = Wait("idle", limits.keep_alive_seconds)
        self.heads = Wait("slow-head", limits.head_timeout_seconds)
        self.unread = Wait("slow-reader", limits.write_timeout_seconds)
        self.lingering = Wait("lingering", LINGER_SECONDS)
        self.half_closed = Wait("half-closed", 0.0)
        self.beyond = Wait("full", _BEYOND_SECONDS)
        self._headers: list[tuple[bytes, bytes]] | None = None
        self._lines = b""
        self._metrics = metrics
        self._throttle = LogThrottle(clock)
        metrics.open_connections.set_function(lambda: len(self.open))

    def start(self) -> None:
        """Look after the connections from now on; call on the event loop."""
        loop = asyncio.get_running_loop()

        def tick() -> None:
            # Before the sweep: a sweep that fails must not be the last one.
            loop.call_later(_SWEEP_SECONDS, tick)
            self.sweep()

        tick()

    def room(self) -> int:
        """How many more may be opened before one has to be closed for another."""
        return self.limits.max_connections - len(self.open)

    def add(self, connection: Connection) -> bool:
        """Take a new connection, replacing an unused one if there are too many.

        Returns whether it may send any request: without room, only probes are answered.
        """
        self.open.add(connection)
        if len(self.open) <= self.limits.max_connections or self._make_room():
            return True
        if len(self.open) > self.limits.max_connections + RESERVED_FOR_PROBES:
            oldest = next(iter(self.beyond), connection)
            oldest.abort("full")
            self.remove(oldest, "full")
        return False

    def remove(self, connection: Connection, reason: str) -> None:
        """Remove a connection that is closed."""
        if connection in self.open:
            self.open.remove(connection)
            self._metrics.connections_closed(reason).inc()

    def lines_of(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The headers of every answer as lines. uvicorn makes a new list of them every second."""
        if self._headers is not headers:
            self._headers, self._lines = headers, header_lines(headers)
        return self._lines

    def count_refused(self) -> None:
        """Count a connection that the door has closed, before it was added here."""
        self._metrics.connections_closed("refused").inc()

    def say(self, event: str, reason: str) -> None:
        """Log an event of a connection, but not every one of a flood."""
        if self._throttle.passed_over(reason) is not None:
            log.warning(event, reason=reason, open_connections=len(self.open))

    def sweep(self) -> None:
        """Close what has waited for too long."""
        now = self.clock()
        for wait in (self.idle, self.heads, self.unread, self.lingering, self.half_closed, self.beyond):
            for connection, since in list(_first(wait, now - wait.seconds)):
                if wait.get(connection) == since:
                    connection.expire(wait.reason)

    async def finish(self, seconds: float) -> bool:
        """Close each connection once it has its answers and is unused; whether all were answered within `seconds`."""
        deadline = self.clock() + seconds
        while self.open and self.clock() < deadline:
            quiet = self.clock() - _QUIET_SECONDS
            for connection, _ in list(_first(self.lingering, quiet)):
                connection.close("drained")
            for connection, _ in list(_first(self.idle, quiet)):
                if connection.unused():
                    connection.end("drained")
            await asyncio.sleep(0.05)
        # Out of time, but these have no complete request: nothing that was accepted is lost with them.
        for wait in (self.idle, self.heads, self.lingering, self.beyond):
            for connection in list(wait):
                if wait is self.lingering or connection.unused():
                    connection.close("drained")
                    self.remove(connection, "drained")
        return not self.open

    def abort_all(self) -> None:
        """Close everything at once."""
        for connection in list(self.open):
            connection.abort("aborted")

    def _make_room(self) -> bool:
        """Close the connection that has been unused for the longest; whether there was one."""
        for wait in (self.lingering, self.idle):
            for connection, _ in _first(wait, self.clock() - _QUIET_SECONDS):
                if wait is self.lingering or connection.unused():
                    self.say("connections are at their limit: the oldest unused one is closed for a new one", "evicted")
                    connection.close("evicted")
                    self.remove(connection, "evicted")
                    return True
        self.say("connections are at their limit, all in use: new ones get 503", "full")
        return False


def _first(wait: Wait, before: float) -> Iterator[tuple[Connection, float]]:
    """Those that have waited since `before` or longer."""
    return itertools.takewhile(lambda item: item[1] <= before, wait.items())
