"""One process of the service, from its settings to its end."""

import signal
import socket
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from fastapi import FastAPI

from service.app import create_app, make_source
from service.http.server.connections import ConnectionLimits
from service.http.server.listening import connections_within_file_limit, require_free_address
from service.http.server.server import Server
from service.logs import Logs, leave_at_once
from service.remote.mirror import Mirror
from service.settings import Settings


def run(
    settings: Settings,
    logs: Logs,
    *,
    make: Callable[..., FastAPI] | None = None,
    listening: Callable[[], list[socket.socket]] | None = None,
    trusted_proxies: tuple[str, ...] | None = None,
) -> None:
    """Serve until a signal ends it. Raises StartupError, or SystemExit with 1 if it could not listen.

    `make` creates the application, with a `source` if the repository is copied, and `listening` the sockets to listen
    on, where these are not as the settings say.
    """
    if settings.keys_file:
        # SIGHUP would end the process by default: ignored until there is a file to read again.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    source: Mirror | None = None

    def leave(number: int, _: object) -> None:
        if source:
            source.close()  # it leaves nothing half written
        leave_at_once(128 + number)

    if not listening:
        require_free_address(settings.host, settings.port)
    # Nothing is accepted while models are loading. Without a handler, process 1 of a container would ignore SIGTERM.
    signal.signal(signal.SIGTERM, leave)
    source = make_source(settings)
    make = make or partial(create_app, settings)
    application = make(source=source) if source else make()
    application.state.pipeline.metrics.registry.register(logs)
    limits: dict[str, Any] = {field.name: getattr(settings, field.name) for field in fields(ConnectionLimits)}
    limits["max_connections"] = connections_within_file_limit(settings.max_connections)
    server = Server(
        application,
        application.state.pipeline,
        ConnectionLimits(**limits),
        refuse=application.state.judge.refusal,
        pressed=application.state.judge.pressed,
        host=settings.host,
        port=settings.port,
        trusted_proxies=settings.trusted_proxies if trusted_proxies is None else trusted_proxies,
        delay_seconds=settings.shutdown_delay_seconds,
        graceful_seconds=settings.graceful_timeout_seconds,
    )
    # A signal that arrives before uvicorn handles signals ends the service as soon as it has started. After shutdown,
    # uvicorn raises the signal that stopped it once more: all is done by then, so the exit status is 0.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    if application.state.key_file:
        signal.signal(signal.SIGHUP, lambda *_: application.state.key_file.reload())
    server.run(listening() if listening else None)
    if not server.started:
        raise SystemExit(1)
