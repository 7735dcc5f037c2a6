"""Content encodings, both ways, within a byte limit."""

import contextlib
import gzip
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BadRequest, BodyTooLarge
from service.http.compression import compress, decompress

TEXT = b"0.125," * 1000


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (gzip.compress(TEXT, mtime=0), "gzip"),
        (gzip.compress(TEXT, mtime=0), " X-GZip "),
        (zlib.compress(TEXT), "deflate"),
        (raw_deflate(TEXT), "deflate"),
        (TEXT, "identity"),
        (TEXT, ""),
    ],
)
def test_decompresses_what_clients_send(body: bytes, encoding: str) -> None:
    assert decompress(body, encoding, max_bytes=len(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("body", "encoding", "message"),
    [
        (b"", "gzip", "cut short"),
        (gzip.compress(TEXT, mtime=0)[:-1], "gzip", "cut short"),
        (zlib.compress(TEXT)[:-1], "deflate", "cut short"),
        (gzip.compress(TEXT, mtime=0) + b"more", "gzip", "4 bytes follow"),
        (gzip.compress(TEXT, mtime=0) * 2, "gzip", "bytes follow"),
        (b"not compressed", "gzip", "not valid gzip"),
        (b"not compressed", "deflate", "not valid deflate"),
        (b"\x78\x9c" + b"\xff" * 20, "deflate", "not valid deflate"),
        (TEXT, "br", "unknown 'br': use gzip or deflate"),
        (TEXT, "gzip, gzip", "use gzip or deflate"),
        (TEXT, "x" * 1000, "use gzip or deflate"),
    ],
)
def test_refuses_what_is_not_one_whole_stream(body: bytes, encoding: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        decompress(body, encoding, max_bytes=10_000)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_bomb_stops_at_the_byte_limit(encoding: str) -> None:
    bomb = (gzip.compress if encoding == "gzip" else zlib.compress)(bytes(50_000_000))
    assert len(bomb) < 100_000
    with pytest.raises(BodyTooLarge, match="1,000 bytes when"):
        decompress(bomb, encoding, max_bytes=1000)


@given(st.binary(max_size=200), st.sampled_from(["gzip", "deflate"]), st.integers(0, 100), st.binary(max_size=3))
def test_damaged_streams_never_escape_as_another_error(body: bytes, encoding: str, place: int, patch: bytes) -> None:
    packed = bytearray((gzip.compress if encoding == "gzip" else zlib.compress)(body))
    packed[place : place + len(patch)] = patch
    for damaged in (bytes(packed), body):
        with contextlib.suppress(BadRequest, BodyTooLarge):
            assert len(decompress(damaged, encoding, max_bytes=100)) <= 100


@pytest.mark.parametrize(
    ("accepted", "chosen"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip ; q=0.5,deflate; Q=0.4", "gzip"),
        ("GZip", "gzip"),
        ("br, zstd, *", "gzip"),
        ("*;q=0.1, gzip;q=0", "deflate"),
        ("gzip;q=0.5, identity", None),
        ("gzip;q=0", None),
        ("*;q=0", None),
        ("identity", None),
        ("br", None),
        ("gzip;q=2", None),
        ("gzip;q=nan", None),
        (",;=", None),
        ("", None),
        (None, None),
    ],
)
def test_compresses_as_the_client_likes_best(accepted: str | None, chosen: str | None) -> None:
    body, encoding = compress(TEXT, accepted)
    assert encoding == chosen
    assert decompress(body, encoding or "", max_bytes=len(TEXT)) == TEXT
    assert (len(body) < len(TEXT)) == (chosen is not None)


def test_deflate_is_sent_with_zlibs_frame_since_that_is_what_clients_undo() -> None:
    assert zlib.decompress(compress(TEXT, "deflate")[0]) == TEXT


def test_bodies_that_gain_nothing_stay_as_they_are() -> None:
    assert compress(TEXT[:500], "gzip") == (TEXT[:500], None)
    noise = np.random.default_rng(0).bytes(5000)
    assert compress(noise, "gzip") == (noise, None)
