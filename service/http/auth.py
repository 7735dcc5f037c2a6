"""Who may ask: API keys before /v1 and /v2, the admin key before loading and unloading."""

from collections.abc import Sequence

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Forbidden, RequestError, Unauthorized
from service.http.keys import KeyRing
from service.http.problems import answer

_OPEN = ("/v2/health/live", "/v2/health/ready")
"""Probes have no key."""
_GUARDED = ("/v1", "/v2")
_ADMIN = "/v2/repository/models/"
"""By prefixes: what a pattern does not match, the router may still match, such as a path that ends in a newline."""


class Gate:
    """ASGI middleware: answers 401 or 403 in place of the application."""

    def __init__(self, app: ASGIApp, *, api_key_hashes: Sequence[str], admin_key_hash: str | None) -> None:
        """Without API keys all may ask; without an admin key nobody may load and unload."""
        self._app = app
        self._keys = KeyRing(api_key_hashes) if api_key_hashes else None
        self._admin = KeyRing([admin_key_hash]) if admin_key_hash else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)):
            await answer(Request(scope), error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        path = scope["path"]
        # Where nothing is locked nothing needs a key: this is on every request's way.
        if not (self._keys or path.startswith("/v2/repository")):
            return None
        if not path.startswith(_GUARDED) or path in _OPEN:
            return None
        key = _offered(scope)
        if path.startswith(_ADMIN):
            return self._refusal_to_administer(key)
        if self._keys is None or self._keys.accepts(key) or (self._admin and self._admin.accepts(key)):
            return None
        return Unauthorized("an API key is needed: send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`")

    def _refusal_to_administer(self, key: str) -> RequestError | None:
        if self._admin is None:
            return Forbidden(
                "loading and unloading are switched off: start the service with an admin key "
                "(python -m service key, then STRIDEVIT_ADMIN_KEY_HASH)"
            )
        if not self._admin.accepts(key):
            return Forbidden("loading and unloading need the admin key, as `Authorization: Bearer KEY`")
        return None


def _offered(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return str(value[7:].strip().decode("latin-1"))
        if name == b"x-api-key":
            return str(value.decode("latin-1"))
    return ""
