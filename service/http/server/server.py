"""The server: from the first connection to the end of the process, which is bounded."""

import asyncio
import functools
import gc
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import structlog
import uvicorn

from service.http.refusal import Refuse
from service.http.server.connections import ConnectionLimits, Connections
from service.http.server.door import Door
from service.http.server.listening import Listener, stop_listening
from service.http.server.protocol import HttpProtocol
from service.logs import leave_at_once
from service.pipeline import Pipeline
from service.scheduling import watchdog

log = structlog.get_logger()

EXIT_ABORTED: Final = 4
"""Exit status when accepted requests did not finish within `graceful_timeout_seconds`, or a thread did not end."""
_CLOSE_SECONDS: Final = 10.0
"""Seconds that all threads may take to end, once no request is left: one may hang in native code or a dead mount."""


class Server(uvicorn.Server):
    """uvicorn with our own connections and our own shutdown.

    On SIGTERM or SIGINT: the service is not ready, and every answer is the last one of its connection; after
    `delay_seconds`, listening ends without losing an established connection; each connection is closed once it is
    answered and unused; the threads end; exit status 0. What is left after `graceful_seconds` is aborted, with
    EXIT_ABORTED. A second signal ends the process at once, with 128 plus the signal's number.
    """

    def __init__(
        self,
        app: Any,
        pipeline: Pipeline,
        limits: ConnectionLimits,
        *,
        refuse: Refuse = lambda _: None,
        pressed: Callable[[], bool] = lambda: False,
        host: str,
        port: int,
        trusted_proxies: tuple[str, ...] = (),
        delay_seconds: float,
        graceful_seconds: float,
        leave: Callable[[int], object] = leave_at_once,
    ) -> None:
        """`refuse` may answer a request on its head alone, in place of the application; `pressed` says whether it is
        likely to. `leave` ends the process with a status, whatever its threads do."""
        self.connections = Connections(limits, pipeline.metrics)
        protocol: Any = functools.partial(HttpProtocol, connections=self.connections, refuse=refuse)
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=protocol,
                # There are no WebSockets here. uvicorn's own would take over any connection that asks for one.
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(trusted_proxies),
                forwarded_allow_ips=list(trusted_proxies),
            )
        )
        self._protocol = protocol
        self._door = Door(self.connections, self.server_state, refuse, pressed)
        self.listeners: list[Listener] = []
        self._pipeline, self._leave = pipeline, leave
        self._delay_seconds, self._graceful_seconds = delay_seconds, graceful_seconds
        # A thread of its own: after `shutdown`, asyncio and the interpreter join all others without a time limit.
        self.fuse = threading.Timer(_CLOSE_SECONDS, self._leave_threads)
        """Ends the process if its threads do not end. Cancel it if the process is to outlive the server."""
        self.fuse.daemon = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen: on `sockets`, which listen already, or else on the host and port."""
        self.connections.start()
        # What is loaded stays: the collector would traverse all of it again and again, each time for some 0.2 s.
        gc.collect()
        gc.freeze()
        await super().startup(sockets)
        for server in self.servers:
            for own in server.sockets:
                listening = socket.fromfd(own.fileno(), own.family, own.type)
                self.listeners.append(Listener(listening, self._protocol_of, room=self.connections.room))
            server.close()

    def _protocol_of(self, connection: socket.socket) -> HttpProtocol | None:
        if (taken := self._door.take(connection)) is None:
            return None
        made: HttpProtocol = self._protocol(
            taken=taken, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what was accepted, then end. uvicorn passes `sockets`, which is not used."""
        del sockets
        self._pipeline.ready = False
        # Nobody waits for a model that is still being loaded.
        self._pipeline.registry.close()
        self.connections.draining = True
        log.info("draining", seconds=self._delay_seconds, open_connections=len(self.connections.open))
        await asyncio.sleep(self._delay_seconds)
        await stop_listening(self.listeners)
        finished = await self.connections.finish(self._graceful_seconds)
        if not finished:
            log.error(
                "requests did not finish within graceful_timeout_seconds: aborted",
                seconds=self._graceful_seconds,
                open_connections=len(self.connections.open),
            )
            self.connections.abort_all()
        self.fuse.start()
        await self.lifespan.shutdown()
        if self._pipeline.scheduler.abandoned:
            # Native code is still running: an ordinary exit would unload its libraries under it.
            log.critical("the engine did not end its work: aborted", exit_status=watchdog.EXIT_STATUS)
            self._leave(watchdog.EXIT_STATUS)
        if not finished:
            self._leave(EXIT_ABORTED)

    def _leave_threads(self) -> None:
        log.error("the threads of the service did not end: aborted", seconds=_CLOSE_SECONDS)
        self._leave(EXIT_ABORTED)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the service, the second one the process."""
        if self.should_exit:
            log.error("second signal: ended at once", signal=signal.Signals(sig).name)
            self._leave(128 + sig)
        super().handle_exit(sig, frame)
