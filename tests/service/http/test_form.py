"""Multipart forms: files and fields, within bounds on their parts."""

import contextlib

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BadRequest
from service.http.form import read_form

TYPE = "multipart/form-data; boundary=b"


def part(head: str, content: bytes = b"x") -> bytes:
    return b"--b\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n"


def field(name: str, content: bytes = b"x") -> bytes:
    return part(f'Content-Disposition: form-data; name="{name}"', content)


def file(content: bytes = b"x", more: str = "") -> bytes:
    return part(f'Content-Disposition: form-data; name="image"; filename="a.png"{more}', content)


END = b"--b--\r\n"


def read(body: bytes, content_type: str = TYPE) -> tuple[list[bytes], dict[str, str]]:
    return read_form(body, content_type, max_images=3, max_fields=3)


@given(
    st.lists(st.binary(max_size=100), min_size=1, max_size=3), st.dictionaries(st.text("abö_"), st.text(), max_size=3)
)
def test_reads_what_a_client_writes(images: list[bytes], fields: dict[str, str]) -> None:
    files = [("image", ("ä.png", image)) for image in images]
    request = httpx.Request("POST", "http://x", files=files, data=fields)
    assert read(request.read(), request.headers["content-type"]) == (images, fields)


def test_a_large_file_that_resembles_boundaries_stays_as_it_is() -> None:
    content = b"\r\n--" * 100_000 + b"\r\n--c\r\n" * 100_000
    assert read(file(content) + END) == ([content], {})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (file() * 4 + END, "more than 3 files"),
        (file() + b"".join(field(f"f{n}") for n in range(4)) + END, "more than 3 fields"),
        (file() + field("a") + field("a") + END, "field 'a' is given twice"),
        (file() + field("a", bytes(4097)) + END, "longer than 4,096 bytes"),
        (file(more="\r\nX-A: 1" * 8) + END, "malformed multipart body"),
        (file(more="\r\nX-A: " + "a" * 5000) + END, "malformed multipart body"),
        (part("Content-Type: image/png") + END, "no Content-Disposition"),
        (file(more="\r\nContent-Transfer-Encoding: base64") + END, "as they are"),
        (field("image", b"https://example.com/cat.jpg") + END, "the service fetches nothing"),
        (field("image", b"photo.jpg") + END, "with the @"),
        (file() + file()[:-4], "cut short"),
        (file()[:20], "cut short"),
        (b"", "cut short"),
    ],
)
def test_refuses_what_is_malformed_or_out_of_bounds(body: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        read(body)


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=", TYPE + "b" * 300])
def test_refuses_a_type_without_a_usable_boundary(content_type: str) -> None:
    with pytest.raises(BadRequest, match="malformed multipart body"):
        read(file() + END, content_type)


@given(st.integers(0, 200), st.binary(max_size=4))
def test_damage_never_escapes_as_another_error(place: int, patch: bytes) -> None:
    body = bytearray(file(b"content") + field("top_k", b"1") + END)
    body[place : place + len(patch)] = patch
    with contextlib.suppress(BadRequest):
        read(bytes(body))
