"""Content encodings of HTTP bodies: gzip and deflate, both ways, within a byte limit. Needs no HTTP framework."""

import re
import zlib
from collections.abc import Sequence

from service.errors import BadRequest, BodyTooLarge

_MIN_COMPRESSED_BYTES = 1024
_WINDOW = {"gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
_ACCEPTED = re.compile(
    r"(gzip|x-gzip|deflate|identity|\*)\s*(?:;\s*q\s*=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?))?", re.IGNORECASE
)


def decompress(body: bytes, encoding: str, *, max_bytes: int) -> bytes:
    """Undo a Content-Encoding: gzip, or deflate with or without zlib's wrapper.

    Raises BodyTooLarge before more than `max_bytes` are held, and BadRequest for anything that is not one whole stream.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in _WINDOW:
        raise BadRequest(f"Content-Encoding: unknown {encoding[:60]!r}: use gzip or deflate")
    try:
        return _inflate(body, _WINDOW[name], name, max_bytes)
    except zlib.error as error:
        if name == "deflate":
            # Browsers and old clients send what RFC 1951 calls deflate, while RFC 9110 means RFC 1950.
            try:
                return _inflate(body, -zlib.MAX_WBITS, name, max_bytes)
            except zlib.error:
                pass
        raise BadRequest(f"Content-Encoding: the body is not valid {name}") from error


def compress(body: bytes, accept_encoding: str | None) -> tuple[bytes, str | None]:
    """The body in the encoding that an Accept-Encoding prefers, and its name; small bodies stay as they are."""
    if len(body) < _MIN_COMPRESSED_BYTES or (name := _preferred(accept_encoding)) is None:
        return body, None
    # Level 1: compressing adds to the caller's latency, and float32 outputs shrink little at any level.
    packer = zlib.compressobj(level=1, wbits=_WINDOW[name])
    packed = packer.compress(body) + packer.flush()
    return (packed, name) if len(packed) < len(body) else (body, None)


def accepts_gzip(accept_encoding: str | None) -> bool:
    """Whether what is stored as gzip may be sent as it is."""
    return _preferred(accept_encoding, among=("gzip",)) == "gzip"


def _preferred(accept_encoding: str | None, *, among: Sequence[str] = ("gzip", "deflate")) -> str | None:
    """The encoding that an Accept-Encoding prefers, or None if it prefers no encoding."""
    weights: dict[str, float] = {}
    for item in (accept_encoding or "").split(","):
        if match := _ACCEPTED.fullmatch(item.strip()):
            weights.setdefault(match[1].lower().removeprefix("x-"), float(match[2] or 1))
    others = weights.get("*", 0.0)
    name = max(among, key=lambda known: weights.get(known, others))
    weight = weights.get(name, others)
    return None if weight == 0 or weight < weights.get("identity", 0.0) else name


def _inflate(body: bytes, wbits: int, name: str, max_bytes: int) -> bytes:
    unpacker = zlib.decompressobj(wbits)
    # One byte beyond the limit tells a body that just fits from one that goes on.
    unpacked = unpacker.decompress(body, max_bytes + 1)
    if len(unpacked) > max_bytes:
        raise BodyTooLarge(f"the body exceeds the limit of {max_bytes:,} bytes when {name} is undone")
    if not unpacker.eof:
        raise BadRequest(f"Content-Encoding: the {name} body is cut short")
    if unpacker.unused_data:
        raise BadRequest(f"Content-Encoding: {len(unpacker.unused_data)} bytes follow the {name} body's end")
    return unpacked
