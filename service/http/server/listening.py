"""The listening sockets: how many descriptors there are for connections, and how listening ends."""

import asyncio
import ctypes
import errno
import functools
import resource
import socket
import struct
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import structlog

from service.errors import StartupError

log = structlog.get_logger()

MOST_CONNECTIONS: Final = 10_000
"""Limit where the limit of descriptors allows so many: idle, they take about 80 MB."""
_RESERVED_FILES: Final = 80
"""Descriptors left for all but connections: bundles that are loaded, pipes, the log, and connections of probes."""
_FEWEST_CONNECTIONS: Final = 16

_ACCEPTED_AT_ONCE: Final = 256
"""Connections accepted in one turn of the loop: its other work waits meanwhile."""
_PAUSE_SECONDS: Final = 1.0

_HANDSHAKE_SECONDS: Final = 0.1
"""Seconds in which handshakes that have begun may complete, before the listening sockets are closed."""
_ACCEPT_SECONDS: Final = 1.0
"""Seconds in which waiting connections may be accepted: without the filter, or descriptors, that might never end."""
_BACKLOG_OFFSET: Final = 24
"""Of `tcpi_unacked` in Linux's struct tcp_info: for a listening socket, the connections that wait to be accepted."""
_SO_ATTACH_FILTER: Final = 26
_DROP_SYN: Final = (
    (0x30, 0, 0, 13),  # load the byte of the TCP flags
    (0x45, 0, 1, 0x02),  # SYN?
    (0x06, 0, 0, 0),  # then drop the packet
    (0x06, 0, 0, 0xFFFFFFFF),  # else keep it
)
"""A classic BPF program."""


def require_free_address(host: str, port: int) -> None:
    """Raise StartupError if the service could not listen there: better now than after all models are loaded."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise StartupError(f"--host {host}: {error.strerror}") from error
    faults: list[OSError] = []
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind(address)
                trial.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StartupError(
                    f"port {port} of {host} is in use: end what listens there, or choose another one with --port"
                ) from error
            faults.append(error)
    # A name may also have an IPv6 address where the system has no IPv6: one address is enough.
    if len(faults) == len(addresses):
        raise StartupError(f"cannot listen on {host}, port {port}: {faults[0].strerror}") from faults[0]


def connections_within_file_limit(wanted: int) -> int:
    """How many connections may be open: `wanted`, or, if that is 0, as many as the limit of file descriptors allows.

    Raises the soft limit towards the hard one, as far as needed. Raises StartupError if there is no room.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 64
    needed = used + _RESERVED_FILES + (wanted or MOST_CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = needed if soft == resource.RLIM_INFINITY else soft
    room -= used + _RESERVED_FILES
    if room < max(wanted, _FEWEST_CONNECTIONS):
        raise StartupError(
            f"{room} connections fit into the limit of {soft} open files (RLIMIT_NOFILE), "
            f"{max(wanted, _FEWEST_CONNECTIONS)} are wanted: raise it with `ulimit -n`"
            + (", or lower max_connections" if wanted else "")
        )
    return wanted or min(room, MOST_CONNECTIONS)


class Listener:
    """Accepts all connections that wait at a listening socket, each time that the loop sees one.

    libuv, and so uvloop, accepts one in each turn of the loop: an overloaded service would leave the others in the
    system's queue, where neither they nor their age are seen.
    """

    def __init__(
        self,
        listening: socket.socket,
        protocol: Callable[[socket.socket], asyncio.Protocol | None],
        *,
        room: Callable[[], int] = lambda: _ACCEPTED_AT_ONCE,
    ) -> None:
        """Call on the event loop; takes over the socket, which listens already.

        `protocol` gives a connection's protocol, or None if it has closed the connection. `room`: for how many
        connections there are descriptors. Without room, one is accepted at a time, and makes room or is refused before
        the next.
        """
        self.socket, self.protocol, self._room = listening, protocol, room
        self.loop = asyncio.get_running_loop()
        listening.setblocking(False)
        self._resume()

    @property
    def waiting(self) -> int:
        """Connections that wait to be accepted; 0 where the system does not say."""
        return _waiting(self.socket)

    def close(self) -> None:
        """Listen no longer. What waits is reset by the system."""
        if self.socket.fileno() >= 0:
            self.loop.remove_reader(self.socket)
            self.socket.close()

    def _resume(self) -> None:
        if self.socket.fileno() >= 0:
            self.loop.add_reader(self.socket, self._accept)

    def _accept(self) -> None:
        for _ in range(max(1, min(self._room(), _ACCEPTED_AT_ONCE))):
            try:
                connection, _ = self.socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # No descriptor is left, or no memory: the next turn would find the same.
                log.error("connections cannot be accepted", reason=str(error))
                self.loop.remove_reader(self.socket)
                self.loop.call_later(_PAUSE_SECONDS, self._resume)
                return
            connection.setblocking(False)
            try:
                protocol = self.protocol(connection)
            except BaseException:
                connection.close()
                raise
            if protocol:
                opening = self.loop.connect_accepted_socket(functools.partial(_same, protocol), connection)
                # Not a task: that would begin, and so read the first request, one turn later.
                self._open(opening, connection)

    def _open(self, opening: Coroutine[Any, Any, Any], connection: socket.socket, _: object = None) -> None:
        """Run `opening` until it waits."""
        try:
            waits_for = opening.send(None)
        except StopIteration:
            return
        except OSError:  # the client has reset it
            connection.close()
        else:
            waits_for.add_done_callback(functools.partial(self._open, opening, connection))


def _same(protocol: asyncio.Protocol) -> asyncio.Protocol:
    return protocol


async def stop_listening(listeners: Sequence[Listener]) -> None:
    """Close the listening sockets without losing any of the connections that clients consider open.

    The system resets what waits to be accepted when a listening socket is closed. So new handshakes are ignored first:
    their clients try again after a second, and are refused then.
    """
    try:
        await last_handshakes([listener.socket for listener in listeners])
    finally:
        for listener in listeners:
            listener.close()


async def last_handshakes(listening: Sequence[socket.socket]) -> None:
    """Ignore new handshakes, and wait until all connections that clients consider open are accepted."""
    for one in listening:
        _ignore_handshakes(one)
    await asyncio.sleep(_HANDSHAKE_SECONDS)
    with suppress(TimeoutError):
        async with asyncio.timeout(_ACCEPT_SECONDS):
            while any(_waiting(one) for one in listening):  # noqa: ASYNC110 (the system tells nobody)
                await asyncio.sleep(0.01)


def _waiting(listening: socket.socket) -> int:
    try:
        info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BACKLOG_OFFSET + 4)
    except OSError:
        return 0
    return int.from_bytes(info[_BACKLOG_OFFSET:], sys.byteorder) if len(info) > _BACKLOG_OFFSET else 0


def _ignore_handshakes(listening: socket.socket) -> None:
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in _DROP_SYN))
    # Where the system has no such filters, a connection made in the last microseconds may be reset.
    with suppress(OSError):
        listening.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(_DROP_SYN), ctypes.addressof(program))
        )
