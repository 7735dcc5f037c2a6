"""Overload: requests that have no chance are refused before anything else is done, at the least cost.

Refusing inference in the ordinary way would take the time that accepted requests need, and when the event loop itself
is late, work queues up in sockets and in the loop, in front of admission. So the server passes each request's head to a
`Judge` before it does anything else with it. The judge refuses requests that have no chance because of the loop's lag,
a full queue or the work ahead. All others go on to admission, which knows more and may still refuse them. Under another
server, the middleware does the same at a higher cost.
"""

import math
import re
import time
from collections.abc import Callable, Collection
from typing import Literal

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Overloaded, RequestError
from service.http import security_headers
from service.http.exchange import DEADLINE_HEADER, PRIORITY_HEADER
from service.http.refusal import Refusal, header_lines
from service.http.request_ids import RequestIds
from service.metrics import Metrics
from service.models.family import pareto_front
from service.pipeline import Pipeline
from service.scheduling.queue import Queue
from service.scheduling.request import RequestState
from service.throttle import LogThrottle

log = structlog.get_logger()

_V1_ROUTE, _HF, _HF_ROUTE = "/v1/classify", "/hf/", "/hf/{name}"
_ROUTES = {"/classify": _V1_ROUTE, "/compare": "/v1/compare", "/infer": "/v2/models/{name}/infer"}
"""The last parts of the paths of inference, and their routes in metrics; paths under /hf end in a model's name."""

_PAGES = ("/", "/docs/")
"""Paths that keep their slash at the end: the first is nothing else, and without it the second would show a page whose
relative links are wrong."""

_CALM_SECONDS = 0.025
"""Delay by the loop's lag below which every request has a chance: nothing more is checked."""

_DEADLINE, _PRIORITY, _REQUEST_ID = DEADLINE_HEADER.lower().encode(), PRIORITY_HEADER.lower().encode(), b"x-request-id"
_DEADLINE_IN_QUERY = re.compile(rb"(?:^|&)deadline_ms=([^&]*)")
_PRIORITY_IN_QUERY = re.compile(rb"(?:^|&)priority=([^&]*)")
_MODEL_IN_QUERY = re.compile(rb"(?:^|&)model=([^&]*)")
_MODEL_IN_PATH = re.compile(r"/v2/models/([^/]+)/infer|/hf/([^/]+)")
_ENCODED = re.compile(rb"[%+]")
_WISHES = (_DEADLINE, _PRIORITY)
_LONGEST_NUMBER = 32

_V1 = (
    b'{"type":"urn:stridevit:overloaded","title":"Too Many Requests","status":429,"detail":"%b: nothing was done for '
    b'this request, send it again later","code":"overloaded","retry_after_ms":%d,"request_id":"%b"}'
)
_OTHERS = b'{"error":"%b: nothing was done for this request, send it again later"}'
_LINES = b"content-type: %b\r\ncontent-length: %d\r\nretry-after: %d\r\nx-request-id: %b\r\n" + header_lines(
    security_headers.API
)
_DETAIL = {
    "lag": b"the service is overloaded and the deadline is too close",
    "deadline": b"the work ahead takes longer than the deadline leaves",
    "images": b"as many images are pending as are allowed",
}

Reason = Literal["lag", "images", "deadline"]


class Judge:
    """Decides from a request's head alone whether it has no chance."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        metrics: Metrics,
        cors_origins: Collection[str],
        has_key: Callable[[Scope], bool] = lambda _: True,
    ) -> None:
        """`cors_origins`: those whose pages may read a refusal, or `*`. `has_key`: whether a request has a key, if it
        needs one: only such a request is told about the work ahead, and counts as coming."""
        self._has_key = has_key
        self._metrics, self._registry = metrics, pipeline.registry
        self._admission, self._lag = pipeline.admission, pipeline.lag
        limits = pipeline.limits
        self._margin, self._longest_ms = limits.deadline_margin, limits.max_deadline_ms
        self._default_ms = limits.default_deadline_ms
        self._origins = {origin.encode() for origin in cors_origins}
        self._ids, self._throttle = RequestIds(), LogThrottle(time.perf_counter)

    def pressed(self) -> bool:
        """Whether some requests may have no chance at present."""
        return self._admission.pressed or self._admission.room.crowded or self._lag.delay_seconds >= _CALM_SECONDS

    def refusal(self, scope: Scope) -> Refusal | None:
        """The answer to a request that has no chance, which is counted as refused; None if it may have one."""
        delay, room, pressed = self._lag.delay_seconds, self._admission.room, self._admission.pressed
        if (delay < _CALM_SECONDS and not (pressed or room.crowded)) or scope["method"] != "POST":
            return None
        path: str = scope["path"]
        route = _HF_ROUTE if path.startswith(_HF) else _ROUTES.get(path[path.rfind("/") :])
        if route is None:
            return None
        query: bytes = scope["query_string"]
        found = _DEADLINE_IN_QUERY.search(query)
        deadline_ms = _milliseconds(found[1]) if found else None
        priority = _PRIORITY_IN_QUERY.search(query)
        batch = priority is not None and priority[1] == b"batch"
        if encoded := _ENCODED.search(query) is not None:
            # What an encoded query says is not known here.
            deadline_ms = deadline_ms or math.inf
        seen: set[bytes] = set()
        for name, value in scope["headers"]:
            # Of several the first one counts, as for the application.
            if name in _WISHES and name not in seen:
                seen.add(name)
                if name == _DEADLINE:
                    deadline_ms = min(deadline_ms or math.inf, _milliseconds(value))
                elif priority is None and not encoded:
                    batch = value == b"batch"
        if room.crowded and not encoded and room.full(batch=batch):
            return self._refuse(scope, "images", route, self._admission.drain_seconds())
        seconds = min(deadline_ms or self._default_ms, self._longest_ms) / 1000
        now = time.perf_counter()
        began: float = scope.get("state", {}).get("first_byte_at", now)
        if now - began + delay > self._margin * seconds:
            ahead = self._admission.drain_seconds() - delay - self._margin * seconds
            return self._refuse(scope, "lag", route, max(self._lag.seconds, ahead))
        if pressed and not encoded and (queue := self._queue(path, query)) is not None and self._has_key(scope):
            state = RequestState(seconds=seconds, priority="batch" if batch else "interactive", arrived_at=began)
            late = self._admission.late_by_head(queue, state)
            if late > 0:
                return self._refuse(scope, "deadline", route, self._admission.retry_seconds(state, late))
        return None

    def _queue(self, path: str, query: bytes) -> Queue | None:
        """The queue of the fastest model that may answer; None where a first look at the head does not tell."""
        if path == _V1_ROUTE:
            named = _MODEL_IN_QUERY.search(query)
            name, plain = named[1].decode("latin-1") if named else None, b"version=" not in query
        else:
            named_in_path = _MODEL_IN_PATH.fullmatch(path)
            name = named_in_path[1] or named_in_path[2] if named_in_path else None
            plain = named_in_path is not None and b"version=" not in query
        if not plain:
            return None
        try:
            return pareto_front(self._registry.candidates(name)[1])[-1].queue
        except RequestError:
            return None

    def _refuse(self, scope: Scope, reason: Reason, route: str, retry_seconds: float) -> Refusal:
        offered = next((value for name, value in scope["headers"] if name == _REQUEST_ID), b"")
        request_id = self._ids.choose(offered.decode("latin-1")).encode()
        retry_ms = max(1, math.ceil(retry_seconds * 1000))
        if route.startswith("/v1"):
            kind, body = b"application/problem+json", _V1 % (_DETAIL[reason], retry_ms, request_id)
        else:
            kind, body = b"application/json", _OTHERS % _DETAIL[reason]
        lines = _LINES % (kind, len(body), max(1, math.ceil(retry_seconds)), request_id)
        if self._origins:
            lines += header_lines(self._cors(scope))
        self._metrics.requests(route, "POST", Overloaded.status).inc()
        self._metrics.rejections(reason).inc()
        self._note()
        return Refusal(Overloaded.status, lines, body)

    def _cors(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """The headers that the CORS middleware would add: a refusal does not pass through it."""
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


class Shedding:
    """ASGI middleware, outside all others: passes to a `Judge` what the server has not passed to it yet."""

    def __init__(self, app: ASGIApp, *, judge: Judge) -> None:
        self._app, self._judge = app, judge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path: str = scope["path"]
            if path[-1:] == "/" and path not in _PAGES:
                # Here, so that all code that checks the path sees the same one.
                scope["path"] = path[:-1]
            elif scope.get("state", {}).get("judged"):
                await self._app(scope, receive, send)
                return
            if refusal := self._judge.refusal(scope):
                status, lines, body = refusal
                headers = [tuple(line.split(b": ", 1)) for line in lines.split(b"\r\n")[:-1]]
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": body})
                return
        await self._app(scope, receive, send)


def _milliseconds(text: bytes) -> float:
    """A deadline, or infinity for anything invalid, which is handled elsewhere."""
    try:
        found = float(text) if len(text) <= _LONGEST_NUMBER else math.inf
    except ValueError:
        return math.inf
    return found if found > 0 else math.inf
