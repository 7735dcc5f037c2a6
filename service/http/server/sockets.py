"""What the system knows about a connection."""

import fcntl
import socket
import termios
from typing import Final

_HALF_CLOSED: Final = b"\x08"  # TCP_CLOSE_WAIT


def nothing_to_read(connection: socket.socket) -> bool:
    """Whether no byte waits to be read."""
    waiting = bytearray(4)
    fcntl.ioctl(connection.fileno(), termios.FIONREAD, waiting)
    return not any(waiting)


def peer_listens(connection: socket.socket) -> bool:
    """Whether a client that sends no more has closed only its own side."""
    if connection.family == socket.AF_UNIX:
        # Only the front connects this way, and it closes both sides.
        return False
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == _HALF_CLOSED
