"""Overload: requests that have no chance are refused first of all, at the least cost.

When the event loop itself is late, work queues in sockets and in the loop, in front of admission. Refusing it in the
ordinary way would take the time that accepted requests need. This middleware stands before all others, and refuses
inference by its head alone if the loop's lag or a full queue leaves it no chance. A request that may have one goes on,
also to be refused by admission, which knows more.
"""

import math
import re
import time
from collections.abc import Collection
from typing import Literal

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Overloaded
from service.http import security_headers
from service.http.exchange import DEADLINE_HEADER, PRIORITY_HEADER
from service.http.request_ids import RequestIds
from service.metrics import Metrics
from service.pipeline import Pipeline
from service.throttle import LogThrottle

log = structlog.get_logger()

_ROUTES = {"/classify": "/v1/classify", "/infer": "/v2/models/{name}/infer"}
"""The ends of the paths of inference, and their routes in metrics."""

_PAGES = ("/", "/docs/")
"""A slash at the end belongs to the first; the second would show a page whose relative links are wrong."""

_CALM_SECONDS = 0.025
"""A delay by the loop's lag that leaves every request its chance: nothing more is looked at."""

_DEADLINE, _PRIORITY, _REQUEST_ID = DEADLINE_HEADER.lower().encode(), PRIORITY_HEADER.lower().encode(), b"x-request-id"
_DEADLINE_IN_QUERY = re.compile(rb"(?:^|&)deadline_ms=([^&]*)")
_BATCH_IN_QUERY = re.compile(rb"(?:^|&)priority=batch(?:&|$)")
_NUMBER = re.compile(rb"\d{1,9}(\.\d{1,9})?")

_V1 = (
    b'{"type":"urn:stridevit:overloaded","title":"Too Many Requests","status":429,"detail":"%b: nothing was done for '
    b'this request, send it again later","code":"overloaded","retry_after_ms":%d,"request_id":"%b"}'
)
_V2 = b'{"error":"%b: nothing was done for this request, send it again later"}'
_DETAIL = {
    "lag": b"the service is overloaded, and the deadline too near",
    "images": b"as many images are pending as are allowed",
}

Reason = Literal["lag", "images"]


class Shedding:
    """ASGI middleware, outside of all others."""

    def __init__(self, app: ASGIApp, *, pipeline: Pipeline, metrics: Metrics, cors_origins: Collection[str]) -> None:
        """`cors_origins`: those whose pages may read a refusal, or `*`."""
        self._app, self._metrics = app, metrics
        self._admission, self._lag = pipeline.admission, pipeline.lag
        limits = pipeline.limits
        self._margin, self._longest_ms = limits.deadline_margin, limits.max_deadline_ms
        self._default_ms = limits.default_deadline_ms
        self._origins = {origin.encode() for origin in cors_origins}
        self._ids, self._throttle = RequestIds(), LogThrottle(time.perf_counter)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        if path[-1:] == "/" and path not in _PAGES:
            # Here, so that all who judge a path see the same one.
            path = scope["path"] = path[:-1]
        if scope["method"] == "POST":
            route = _ROUTES.get(path[path.rfind("/") :])
            if route and (reason := self._reason(scope)):
                await self._refuse(scope, send, reason, route)
                return
        await self._app(scope, receive, send)

    def _reason(self, scope: Scope) -> Reason | None:
        """Why the request has no chance; None if it may have one."""
        delay, crowded = self._lag.delay_seconds, self._admission.room.crowded
        if delay < _CALM_SECONDS and not crowded:
            return None
        query: bytes = scope["query_string"]
        found = _DEADLINE_IN_QUERY.search(query)
        deadline_ms = _milliseconds(found[1]) if found else math.inf
        batch = _BATCH_IN_QUERY.search(query) is not None
        for name, value in scope["headers"]:
            if name == _DEADLINE:
                deadline_ms = min(deadline_ms, _milliseconds(value))
            elif name == _PRIORITY:
                batch = batch or value == b"batch"
        if crowded and self._admission.room.full(batch=batch):
            return "images"
        if deadline_ms == math.inf:
            deadline_ms = self._default_ms
        now = time.perf_counter()
        age: float = now - scope.get("state", {}).get("first_byte_at", now)
        return "lag" if age + delay > self._margin * min(deadline_ms, self._longest_ms) / 1000 else None

    async def _refuse(self, scope: Scope, send: Send, reason: Reason, route: str) -> None:
        offered = next((value for name, value in scope["headers"] if name == _REQUEST_ID), b"")
        request_id = self._ids.choose(offered.decode("latin-1")).encode()
        retry_ms = max(1, math.ceil(self._admission.drain_seconds() * 1000))
        if route == "/v1/classify":
            kind, body = b"application/problem+json", _V1 % (_DETAIL[reason], retry_ms, request_id)
        else:
            kind, body = b"application/json", _V2 % _DETAIL[reason]
        headers = [
            (b"content-type", kind),
            (b"content-length", b"%d" % len(body)),
            (b"retry-after", b"%d" % max(1, math.ceil(retry_ms / 1000))),
            (b"x-request-id", request_id),
            *security_headers.API,
        ]
        if self._origins:
            headers += self._cors(scope)
        await send({"type": "http.response.start", "status": Overloaded.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        self._metrics.requests(route, "POST", Overloaded.status).inc()
        self._metrics.rejections(reason).inc()
        self._note()

    def _cors(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """What the CORS middleware, which a refusal does not reach, would add."""
        allowed = b"*"
        if allowed not in self._origins:
            allowed = next((value for name, value in scope["headers"] if name == b"origin"), b"")
        if allowed != b"*" and allowed not in self._origins:
            return [(b"vary", b"Origin")]
        return [
            (b"access-control-allow-origin", allowed),
            (b"access-control-expose-headers", b"*"),
            *([] if allowed == b"*" else [(b"vary", b"Origin")]),
        ]

    def _note(self) -> None:
        """Log now and then: a line for each refusal would cost more than the refusal."""
        if (passed_over := self._throttle.passed_over("shed")) is not None:
            log.warning("requests shed", requests=passed_over + 1, lag_ms=round(self._lag.seconds * 1000, 1))


def _milliseconds(text: bytes) -> float:
    """A deadline, or infinity for anything odd, which is judged elsewhere."""
    return float(text) if _NUMBER.fullmatch(text) else math.inf
