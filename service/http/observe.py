"""Every request gets an id and its answer security headers; it is counted, timed, traced and logged by its route."""

import time
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.request_ids import RequestIds
from service.http.security_headers import SecurityHeaders
from service.http.server.protocol import PROBES
from service.metrics import Metrics
from service.tracing import Tracing

log = structlog.get_logger()


class Observe:
    """ASGI middleware, outside all but shedding. It leaves `request_id` and `started` in the state of the scope."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        tracing: Tracing | None,
        log_requests: str,
        security_headers: SecurityHeaders,
    ) -> None:
        """`log_requests`: `none`, `errors` (4xx and 5xx) or `all`."""
        self._app, self._metrics, self._tracing, self._security = app, metrics, tracing, security_headers
        self._ids = RequestIds()
        self._lowest_logged_status = {"none": 1000, "errors": 400, "all": 0}[log_requests]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        # The server knows when the first byte of the head was read; other servers, and tests, do not say.
        started: float = state.get("first_byte_at") or time.perf_counter()
        headers, path = Headers(scope=scope), scope["path"]
        request_id = self._ids.choose(headers.get("x-request-id", ""))
        state.update(request_id=request_id, started=started)
        # Probes and scrapes come every few seconds, and nobody looks for a single one of them.
        tracing = self._tracing if self._tracing and not _is_probe(path) else None
        span = tracing.begin(scope["method"], headers) if tracing else None
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode()), *self._security.of(path, status)]
                if tracing:
                    own += [(name.encode(), value.encode()) for name, value in tracing.context(span).items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            key = state.get("key")
            if key:
                key.usage.statuses[status] += 1
            # The route's template, so that arbitrary paths add no time series.
            route: str | None = getattr(scope.get("route"), "path", None)
            counted = route or "other"
            self._metrics.requests(counted, scope["method"], status).inc()
            self._metrics.request_seconds(counted).observe(seconds)
            if tracing:
                tracing.end(
                    span,
                    method=scope["method"],
                    route=route,
                    attributes={
                        "url.path": path,
                        "url.scheme": scope["scheme"],
                        "network.protocol.version": scope["http_version"],
                        "http.response.status_code": status,
                        "stridevit.model": state.get("model", ""),
                        "stridevit.request_id": request_id,
                        "stridevit.key": key.name if key else "",
                    },
                    timings_ms=state.get("timings_ms", {}),
                )
            if status >= self._lowest_logged_status:
                log.info(
                    "request",
                    request_id=request_id,
                    method=scope["method"],
                    route=counted,
                    status=status,
                    ms=round(seconds * 1000, 3),
                    model=state.get("model"),
                    key=key and key.name,
                )


def _is_probe(path: str) -> bool:
    return path in PROBES or (path.startswith("/v2/models/") and path.endswith("/ready"))
