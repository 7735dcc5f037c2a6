"""API keys over HTTP: for /v1, /v2 and /hf, for loading and unloading, and for other pages if the settings say so."""

import time
from collections.abc import Callable, Collection, Iterator

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Forbidden, KeyLimited, RequestError, Unauthorized
from service.http.problems import error_response
from service.keys import Key, KeyRing
from service.metrics import Metrics

_OPEN = ("/v2/health/live", "/v2/health/ready")
"""Probes need no key."""
_GUARDED = ("/v1", "/v2", "/hf/")
_ADMIN = "/v2/repository/models/"
"""Compared as a prefix: the router may match a path that a pattern does not, such as one that ends in a newline."""
_INDEX = "/v2/repository/index"

PAGES = {"metrics": ("/metrics",), "docs": ("/docs", "/openapi.json")}
"""Paths, by prefix, that need a key if the settings say so."""

_ANY = frozenset({"classify", "read", "admin"})
_CLASSIFY, _READ = frozenset({"classify"}), frozenset({"read"})
_HINT = "send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`"


class KeyGate:
    """ASGI middleware: answers 401, 403 or 429 instead of calling the application, before a body is read.

    It leaves the request's `key` in the state of the scope.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        ring: KeyRing,
        required: bool,
        guarded_pages: Collection[str] = (),
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`required`: whether /v1, /v2 and /hf need a key; loading and unloading always do. `clock`: the time of
        day."""
        self._app, self._ring, self._metrics, self._clock = app, ring, metrics, clock
        self._pages = tuple(path for page in guarded_pages for path in PAGES[page])
        # Compared before all else, for speed: every request passes here.
        self._prefixes = (*_GUARDED, *self._pages) if required else (_ADMIN, *self._pages)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self._prefixes) or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        try:
            key = self._permitted(scope)
            scope["state"]["key"] = key
            started = key.usage.begin(key.entry)
        except RequestError as error:
            if isinstance(error, KeyLimited):
                self._metrics.rejections(error.reason).inc()
            await error_response(Request(scope), error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            key.usage.end(started)

    def _permitted(self, scope: Scope) -> Key:
        """The key that allows this request. Raises Unauthorized or Forbidden."""
        path = scope["path"]
        if path.startswith(_ADMIN):
            return self._admin(scope)
        known = [key for value in offered(scope) if (key := self._ring.find(value))]
        valid = [key for key in known if not key.expired(self._clock())]
        if not valid:
            if known:
                raise Unauthorized(f"the key {known[0].name} has expired: ask for a new one")
            raise Unauthorized("this API key is not valid" if any(offered(scope)) else f"an API key is needed: {_HINT}")
        if path.startswith(self._pages):
            needed = _READ
        else:
            needed = _ANY if scope["method"] in ("GET", "HEAD") or path == _INDEX else _CLASSIFY
        for key in valid:
            if key.scopes & needed:
                return key
        raise Forbidden(f"the key {valid[0].name} lacks the scope {' or '.join(sorted(needed))}, which this needs")

    def _admin(self, scope: Scope) -> Key:
        now = self._clock()
        if not any("admin" in key.scopes for key in self._ring.keys):
            raise Forbidden(
                "loading and unloading are switched off: start the service with an admin key "
                "(stridevit key, then STRIDEVIT_ADMIN_KEY_HASH, or the scope `admin` in the file of keys)"
            )
        for value in offered(scope):
            key = self._ring.find(value)
            if key and "admin" in key.scopes and not key.expired(now):
                return key
        raise Forbidden(f"loading and unloading need an admin key: {_HINT}")


def offered(scope: Scope) -> Iterator[str]:
    """The keys that a request offers: clients and proxies add headers of their own, and one right key is enough."""
    bearers = keys = 0
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer " and not bearers:
            bearers += 1
            yield value[7:].strip().decode("latin-1")
        elif name == b"x-api-key" and not keys:
            keys += 1
            yield value.decode("latin-1")
