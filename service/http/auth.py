"""API keys: required under /v1 and /v2, and the admin key for loading and unloading.

The service knows only hashes of the keys, so that neither its settings nor its memory give a key away.
"""

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Forbidden, RequestError, Unauthorized
from service.http.problems import error_response

_OPEN = ("/v2/health/live", "/v2/health/ready")
"""Probes have no key."""
_GUARDED = ("/v1", "/v2")
_ADMIN = "/v2/repository/models/"
"""By prefix: the router may match a path that a pattern does not, such as one that ends in a newline."""


class KeyRing:
    """The keys that are accepted."""

    def __init__(self, hashes: Sequence[str]) -> None:
        """`hashes`: SHA-256 of each key, in hexadecimal. Raises ValueError if one is not hexadecimal."""
        self._digests = tuple(bytes.fromhex(digest) for digest in hashes)

    def accepts(self, key: str) -> bool:
        """Whether `key` is one of them, in a time that reveals neither how near it came nor to which."""
        digest = _digest(key)
        accepted = False
        for known in self._digests:
            accepted |= hmac.compare_digest(digest, known)
        return accepted


def new_key() -> tuple[str, str]:
    """A random key of 256 bits, and the hash by which the service knows it."""
    key = secrets.token_urlsafe(32)
    return key, _digest(key).hex()


def _digest(key: str) -> bytes:
    # Neither salt nor a slow hash: a key is random, not chosen, so there is no dictionary to try.
    # "surrogatepass", since a header may hold anything and must be refused without an exception.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class KeyGate:
    """ASGI middleware: answers 401 or 403 instead of calling the application."""

    def __init__(self, app: ASGIApp, *, api_key_hashes: Sequence[str], admin_key_hash: str | None) -> None:
        """Without API keys everybody has access; without an admin key nobody can load and unload."""
        self._app = app
        self._keys = KeyRing(api_key_hashes) if api_key_hashes else None
        self._admin = KeyRing([admin_key_hash]) if admin_key_hash else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)):
            await error_response(Request(scope), error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        path = scope["path"]
        # First of all for speed: every request passes here.
        if not (self._keys or path.startswith("/v2/repository")):
            return None
        if not path.startswith(_GUARDED) or path in _OPEN:
            return None
        key = _offered_key(scope)
        if path.startswith(_ADMIN):
            return self._admin_refusal(key)
        if self._keys is None or self._keys.accepts(key) or (self._admin and self._admin.accepts(key)):
            return None
        return Unauthorized("an API key is needed: send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`")

    def _admin_refusal(self, key: str) -> RequestError | None:
        if self._admin is None:
            return Forbidden(
                "loading and unloading are switched off: start the service with an admin key "
                "(stridevit key, then STRIDEVIT_ADMIN_KEY_HASH)"
            )
        if not self._admin.accepts(key):
            return Forbidden("loading and unloading need the admin key, as `Authorization: Bearer KEY`")
        return None


def _offered_key(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return str(value[7:].strip().decode("latin-1"))
        if name == b"x-api-key":
            return str(value.decode("latin-1"))
    return ""
