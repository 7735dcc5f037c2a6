"""Images as base64 in JSON: the forms that are read, and what is said about the others."""

import base64
import contextlib
import json
import textwrap
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BadRequest, InvalidParameter, RequestError, UnsupportedImage
from service.http import json_images
from service.http.json_images import is_json, read_images

IMAGE = bytes(range(256))
B64 = base64.b64encode(IMAGE).decode()
OPTIONS = ("model", "top_k", "min_top1")


def read(value: Any, *, text: bytes | None = None) -> tuple[list[bytes], dict[str, Any]]:
    return read_images(json.dumps(value).encode() if text is None else text, max_images=3, options=OPTIONS)


@given(st.binary(min_size=1, max_size=200))
def test_every_way_to_write_base64_gives_the_bytes(image: bytes) -> None:
    standard = base64.b64encode(image).decode()
    for text in (
        standard,
        standard.rstrip("="),
        base64.urlsafe_b64encode(image).decode(),
        "\n".join(textwrap.wrap(standard, 76)),
        base64.encodebytes(image).decode(),
        f"data:image/png;base64,{standard}",
        f"data:image/jpeg;charset=utf-8;base64,{standard}",
        f"DATA:;BASE64,{standard}",
    ):
        assert read({"image": text}) == ([image], {})


@pytest.mark.parametrize(
    "value",
    [
        {"image": B64},
        {"images": [B64]},
        {"image": {"b64": B64}},
        {"instances": [B64]},
        {"instances": [{"b64": B64}]},
        {"instances": [{"image": {"b64": B64}}]},
        {"instances": [{"image_bytes": {"b64": B64}}]},
        {"inputs": B64},
        {"inputs": [B64]},
        {"inputs": {"b64": B64}},
        {"inputs": B64, "parameters": {}},
        {"inputs": B64, "parameters": None},
        {"image": B64, "model": None},
        [B64],
        B64,
    ],
)
def test_reads_the_forms_that_people_try_first(value: Any) -> None:
    assert read(value) == ([IMAGE], {})
    assert read(value, text=json.dumps(value, indent=2).encode()) == ([IMAGE], {})


def test_options_stand_beside_the_image_or_where_hugging_face_has_them() -> None:
    assert read({"image": B64, "top_k": 3, "model": "a"})[1] == {"top_k": 3, "model": "a"}
    assert read({"inputs": B64, "parameters": {"top_k": 3}})[1] == {"top_k": 3}


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ({"image": "https://example.com/cat.jpg"}, UnsupportedImage, "image: .* the service fetches nothing"),
        ({"images": [B64, "s3://bucket/cat.jpg"]}, UnsupportedImage, r"images\.1: .* the service fetches nothing"),
        ({"image": {"image_url": {"url": "x"}}}, UnsupportedImage, "the service fetches nothing"),
        ({"image": "photo.jpg"}, BadRequest, r"not base64 \('photo.jpg'\): write \{\"image\""),
        ({"image": "ä"}, BadRequest, "not base64"),
        ({"image": ""}, BadRequest, "empty"),
        ({"image": "data:image/png,abc"}, BadRequest, "a data URL must be in base64"),
        ({"image": None}, BadRequest, "not a string in base64"),
        ({"images": []}, BadRequest, "carries 1 to 3 images; got 0"),
        ({"images": [B64] * 4}, BadRequest, "carries 1 to 3 images; got 4"),
        ({"instances": [[[0, 1], [2, 3]]]}, BadRequest, "pixels go to POST /v2/models/NAME/infer"),
        ({"image": B64, "images": [B64]}, BadRequest, "exactly one of image, images, instances, inputs"),
        ({"img": B64}, BadRequest, "exactly one of .* got none of them"),
        ({"image": B64, "topk": 1}, InvalidParameter, "unknown member 'topk': did you mean 'top_k'"),
        ({"image": B64, "parameters": {"k": 1}}, InvalidParameter, "JSON: parameters: unknown member 'k'"),
        ({"image": B64, "parameters": {"image": 1}}, InvalidParameter, r"'image'; there are: min_top1, model, top_k$"),
        ({"image": B64, "parameters": 3}, BadRequest, "parameters: not an object: write"),
        ({"inputs": [{"name": "image", "datatype": "BYTES"}]}, BadRequest, "Open Inference Protocol"),
        ({"image": {"b64": B64, "more": 1}}, BadRequest, "must hold one image"),
        ({"image": {"b64": {"b64": {"b64": {"b64": B64}}}}}, BadRequest, "not a string in base64"),
    ],
)
def test_says_what_is_wrong_and_where(value: Any, kind: type[RequestError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        read(value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        b'{"image": [' + b"1," * 1_000_000 + b"1]}",
        b"[" * 1_000_000,
        b'{"a":' * 100_000,
        b"{" + b'"a":1,' * 100_000 + b'"a":1}',
        b'["' + b'","' * 100_000 + b'"]',
    ],
)
def test_a_text_of_many_values_is_refused_before_it_is_parsed(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_images, "_decoded", lambda *_: pytest.fail("it was parsed"))
    with pytest.raises(BadRequest, match="too many values"):
        read(None, text=text)


@pytest.mark.parametrize(
    "text", [b"{", b'{"image"', b"[1", b'"abc', b"{} x", b'{"image": "\xff"}', b'"\\ud800"', b"[[[[[["]
)
def test_malformed_json_is_a_bad_request(text: bytes) -> None:
    assert is_json(text)
    with pytest.raises(BadRequest):
        read(None, text=text)


@given(st.binary(max_size=40), st.integers(0, 60))
def test_damage_never_escapes_as_another_error(patch: bytes, place: int) -> None:
    text = bytearray(json.dumps({"images": [B64[:20], {"b64": B64[:20]}], "top_k": 1}).encode())
    text[place : place + len(patch)] = patch
    with contextlib.suppress(RequestError):
        read(None, text=bytes(text))


@pytest.mark.parametrize(
    ("body", "expected"), [(b'{"a"', True), (b"\n [1", True), (b'"a', True), (b"", False), (b" x", False)]
)
def test_json_is_told_by_its_beginning(body: bytes, *, expected: bool) -> None:
    assert is_json(body) is expected


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("", True),
        ("application/json; charset=utf-8", True),
        ("application/x-www-form-urlencoded", True),
        ("Application/Octet-Stream", False),
        ("image/jpeg", False),
    ],
)
def test_what_is_sent_as_a_file_is_not_meant_as_json(content_type: str, *, expected: bool) -> None:
    assert is_json(b'{"a"', content_type) is expected


def test_no_image_file_looks_like_json() -> None:
    for start in (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF", b"\0\0\0 ftypavif"):
        assert not is_json(start)
