"""An answer in place of the application's."""

import functools
import http
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from starlette.types import Scope

CLOSE: Final = b"connection: close\r\n\r\n"
"""The end of the head of an answer after which the connection is closed."""


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Headers as lines of a head."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


@functools.cache
def status_line(status: int) -> bytes:
    """The first line of an answer."""
    phrase = next((known.phrase for known in http.HTTPStatus if known == status), "")
    return f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii")


class Refusal(NamedTuple):
    """An answer that depends on a request's head alone."""

    status: int
    lines: bytes
    """The lines of its head, each with its line end; without those that say whether the connection stays open."""
    body: bytes

    def bytes(self, default_headers: bytes, ending: bytes) -> bytes:
        """The whole answer: `default_headers` are lines too, and `ending` is the last of them with the empty line."""
        return b"".join((status_line(self.status), default_headers, self.lines, ending, self.body))


Refuse = Callable[[Scope], Refusal | None]
"""Gives the answer to a request that is refused on its head alone, None for all others."""
