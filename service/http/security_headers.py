"""Headers that tell browsers what they may do with an answer: nothing, except with the pages made for them."""

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Final

Headers = tuple[tuple[bytes, bytes], ...]

_EVERYWHERE: Final[Headers] = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # Pages of other origins may read an answer only through CORS, where the settings allow it.
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)
_CLOSED: Final = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

API: Final[Headers] = (
    *_EVERYWHERE,
    (b"content-security-policy", _CLOSED.encode()),
    # Predictions are private, and an error must not outlive its cause.
    (b"cache-control", b"no-store"),
)
"""For every answer but the pages and their parts; errors too."""

_PARTS: Final[Headers] = (*_EVERYWHERE, (b"content-security-policy", _CLOSED.encode()), (b"cache-control", b"no-cache"))


def page_headers(
    html: str, *, allowed: Sequence[str], scripts: Sequence[str] = (), styles: Sequence[str] = ()
) -> Headers:
    """The headers of a page: it may run its inline scripts, and those from `scripts`.

    `styles`: where styles may come from; by default only inline ones. `allowed`: other directives of the policy.
    """
    directives = (
        _CLOSED,
        " ".join(("script-src", *_hashes(html, "script"), *scripts)),
        " ".join(("style-src", *(styles or _hashes(html, "style")))),
        *allowed,
    )
    return (*_EVERYWHERE, (b"content-security-policy", "; ".join(directives).encode()), (b"cache-control", b"no-cache"))


def _hashes(html: str, kind: str) -> list[str]:
    texts = re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]


class SecurityHeaders:
    """The headers of each answer, made once at start."""

    def __init__(self, pages: dict[str, Headers], *, parts: tuple[str, ...]) -> None:
        """`pages`: by path. `parts`: the prefixes of scripts and pictures of the pages."""
        self._pages, self._parts = pages, parts

    def of(self, path: str, status: int) -> Headers:
        """The headers to add to an answer."""
        if status < 400:
            page = self._pages.get(path)
            if page is not None:
                return page
            if path.startswith(self._parts):
                return _PARTS
        return API
