"""`python -m service.workers.worker ORDERS`: one worker, as the supervisor starts it.

It is the service of one process, at a UNIX socket, with limits that it shares with the other workers. Its orders are a
file in the supervisor's private folder: the settings with which the supervisor was started, and a secret.
"""

import ctypes
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

PR_SET_PDEATHSIG: Final = 1
_BACKLOG: Final = 2048


class Orders(BaseModel):
    """What a worker is to do, as JSON."""

    number: int
    workers: int
    supervisor: int
    """The id of its process."""
    socket: Path
    supervisor_socket: Path
    sums: Path
    packed: Path
    """Where workers share packed weights."""
    token: str
    cores: tuple[int, ...]
    reuse_port: bool
    """Whether to listen at the host and port as well, as all other workers do."""
    settings: dict[str, Any]


def end_with(parent: int) -> None:
    """Let the system kill this process when `parent` dies; exit if it has died already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def main(file: Path) -> None:
    """Serve until SIGTERM."""
    orders = Orders.model_validate_json(file.read_bytes())
    end_with(orders.supervisor)
    if orders.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, orders.cores)
    # After the cores are set, as libraries start threads according to them.
    from service.errors import ServiceError  # noqa: PLC0415
    from service.logs import Logs  # noqa: PLC0415
    from service.settings import Settings  # noqa: PLC0415

    settings = Settings(**orders.settings)
    with Logs(
        settings.log_level, buffer_bytes=settings.log_buffer_bytes, flush_seconds=settings.log_flush_seconds
    ) as logs:
        import structlog  # noqa: PLC0415

        structlog.contextvars.bind_contextvars(worker=orders.number)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        try:
            _serve(orders, settings, logs)
        except ServiceError as error:
            structlog.get_logger().error(str(error))
            sys.exit(1)


def _serve(orders: Orders, settings: Any, logs: Any) -> None:
    from service.app import create_app, limits_of  # noqa: PLC0415
    from service.http.server.protocol import UNIX_PEER  # noqa: PLC0415
    from service.running import run  # noqa: PLC0415
    from service.workers.inside import Inside  # noqa: PLC0415
    from service.workers.sums import SharedRoom, SharedUsage, Sums  # noqa: PLC0415

    sums = Sums(orders.sums, rows=orders.workers + 1, row=orders.number)

    def application(source: Any = None) -> Any:
        made = create_app(
            settings,
            source=source,
            room=SharedRoom(sums, **limits_of(settings).of_room()),
            usage=lambda name: SharedUsage(sums, name),
            packed=orders.packed,
        )
        made.add_middleware(Inside, of=made, supervisor=orders.supervisor_socket, token=orders.token)
        return made

    def listening() -> list[socket.socket]:
        sockets = [_unix_socket(orders.socket)]
        if orders.reuse_port:
            sockets.append(_shared_port(settings.host, settings.port))
        return sockets

    # Only the front reaches the UNIX socket, and it knows the client.
    trusted = settings.trusted_proxies if orders.reuse_port else (UNIX_PEER, *settings.trusted_proxies)
    run(settings, logs, make=application, listening=listening, trusted_proxies=trusted)


def _unix_socket(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.bind(str(path))
    found.listen(_BACKLOG)
    return found


def _shared_port(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    found.bind(address)
    found.listen(_BACKLOG)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
