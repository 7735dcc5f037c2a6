"""Parses the bytes of a connection into requests with httptools (llhttp in its strict mode), within bounds.

- A head is bounded by `max_head_bytes`, `max_url_bytes` and `max_headers`, which it may exceed by two pieces of
  _PIECE_BYTES at most, although one read of the socket may return 256 kB.
- The framing of a chunked body (sizes, extensions, trailers) is bounded by `max_head_bytes` from one piece of the body
  to the next.
- What could be read in two ways is refused, so that no proxy can have read it differently. llhttp refuses
  Content-Length with Transfer-Encoding, either of them twice, bare line feeds, folded lines; this parser refuses
  codings other than `chunked`, Transfer-Encoding in HTTP/1.0, and a missing or second Host.
- `Upgrade` is ignored, as RFC 9110 allows: by itself, llhttp would take the body for another protocol.
"""

import urllib.parse
from dataclasses import dataclass
from typing import Any, Final, Protocol

import httptools

from service.errors import BadRequest, HeadTooLarge, RequestError, UrlTooLong
from service.http.server.connections import ConnectionLimits

_PIECE_BYTES: Final = 4096
"""What is parsed at once outside of a body of known length: bounds are checked in between."""
_NOTED: Final = frozenset((b"host", b"expect", b"content-length", b"transfer-encoding"))


class Refused(Exception):
    """No more bytes are read. `error` is the answer; None ends the connection without one."""

    def __init__(self, error: RequestError | None) -> None:
        super().__init__()
        self.error = error


@dataclass(slots=True)
class Head:
    """The head of one request."""

    scope: dict[str, Any]
    """Its ASGI scope, without what belongs to the connection and without the state."""
    keep_alive: bool
    expects_continue: bool
    content_length: int | None
    """None with a chunked body, 0 without a body."""


class Sink(Protocol):
    """Takes what is parsed."""

    def begin(self) -> None:
        """The first byte of a head. May raise Refused."""

    def head(self, head: Head) -> None:
        """A complete head. May raise Refused."""

    def body(self, data: bytes) -> None:
        """A piece of the body."""

    def complete(self) -> None:
        """The end of the body."""


class Parser:
    """The parser of one connection. Callbacks of httptools begin with `on_`."""

    def __init__(self, limits: ConnectionLimits, sink: Sink) -> None:
        self._limits, self._sink = limits, sink
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._noted: list[tuple[bytes, bytes]] = []
        self._upgrading = False
        self.in_head = self._in_body = False
        # What has yet to arrive of a body with a Content-Length.
        self._body_left = 0
        # Bytes of the present piece, and of the earlier ones that hold a part of the head.
        self._read = self._head_read = 0
        # Bytes since the piece in which the head began or ended, or which held a part of the body.
        self._overhead = 0

    @property
    def path(self) -> bytes:
        """That of the last request, as far as it was read."""
        return self._url

    def close(self) -> None:
        """Parse no more: `feed` must not be called again."""
        del self._parser, self._sink

    def feed(self, data: bytes) -> None:
        """Parse the next bytes. Raises Refused."""
        rest = memoryview(data)
        while rest:
            size = self._body_left or _PIECE_BYTES
            self._feed(rest[:size])
            rest = rest[size:]

    def _feed(self, data: memoryview) -> None:
        self._read = len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, Refused):
                raise error.__context__ from None
            raise Refused(BadRequest(f"not HTTP/1.1: {error}")) from error
        if self.in_head or self._in_body:
            self._overhead += self._read
            self._head_read += self._read
            if self._overhead > self._limits.max_head_bytes:
                raise Refused(self._too_long())

    def on_message_begin(self) -> None:
        if not self._upgrading:
            self._sink.begin()
            self.in_head, self._overhead, self._head_read = True, -self._read, 0
            self._url, self._headers, self._noted = b"", [], []

    def on_url(self, url: bytes) -> None:
        if not self._upgrading:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        # What comes after the body is a trailer: nothing of it is used.
        if self.in_head:
            name = name.lower()
            self._headers.append((name, value))
            if name in _NOTED:
                self._noted.append((name, value))

    def on_headers_complete(self) -> None:
        if not self._upgrading:
            head = self._head()
            self.in_head, self._in_body, self._overhead = False, True, -self._read
            self._body_left = head.content_length or 0
            self._sink.head(head)

    def on_body(self, data: bytes) -> None:
        self._overhead = -self._read
        if self._body_left:
            self._body_left -= len(data)
        self._sink.body(data)

    def on_message_complete(self) -> None:
        if self._upgrading or not self._parser.should_upgrade():
            self._in_body = False
            self._sink.complete()

    def _go_on_without_upgrade(self, rest: memoryview) -> None:
        """Let a new parser read what follows, after a head with the same framing and without `Upgrade`."""
        framing = b"".join(b"%b: %b\r\n" % (name, value) for name, value in self._noted if name != b"expect")
        self._parser = httptools.HttpRequestParser(self)
        self._upgrading = True
        self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % framing)
        self._upgrading = False
        if rest:
            self._feed(rest)

    def _head(self) -> Head:
        limits, headers, parser = self._limits, self._headers, self._parser
        if len(self._url) > limits.max_url_bytes or len(headers) > limits.max_headers or self._head_is_too_large():
            raise Refused(self._too_long())
        version, method = parser.get_http_version(), parser.get_method().decode("ascii")
        expects_continue, hosts = False, 0
        length: int | None = 0
        for name, value in self._noted:
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                length = int(value)
            elif name == b"expect":
                # HTTP/1.0 has no status 100: RFC 9110 has `Expect` ignored there.
                expects_continue = version == "1.1" and value.lower() == b"100-continue"
            else:
                length = None
                if value.lower() != b"chunked" or version != "1.1":
                    raise Refused(BadRequest("the only transfer coding is `chunked`, in HTTP/1.1"))
        if version not in {"1.1", "1.0"} or method == "CONNECT":
            raise Refused(BadRequest(f"{method} with HTTP/{version} is not served here: use HTTP/1.1"))
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise Refused(BadRequest("a request needs exactly one Host header"))
        try:
            url = httptools.parse_url(self._url)
            path = url.path.decode("ascii")
        except (httptools.HttpParserError, UnicodeError, AttributeError):
            raise Refused(BadRequest("the request's target is not a path")) from None
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "scheme": "http",
            "method": method,
            "path": urllib.parse.unquote(path) if "%" in path else path,
            "raw_path": url.path,
            "query_string": url.query or b"",
            "root_path": "",
            "headers": headers,
        }
        return Head(scope, parser.should_keep_alive(), expects_continue, length)

    def _head_is_too_large(self) -> bool:
        most = self._limits.max_head_bytes
        # Added up only where it matters.
        return self._head_read + self._read > most and (
            len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers) > most
        )

    def _too_long(self) -> RequestError:
        limits = self._limits
        if self._in_body:
            return BadRequest("the sizes, extensions or trailers of the body's chunks are too long")
        if len(self._url) > limits.max_url_bytes:
            return UrlTooLong(f"the URL exceeds {limits.max_url_bytes:,} bytes: send what is long in the body")
        return HeadTooLarge(f"the head exceeds {limits.max_head_bytes:,} bytes or {limits.max_headers:,} headers")
