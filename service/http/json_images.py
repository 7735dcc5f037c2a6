"""Encoded images in JSON, as base64: in our own form, and as clients of TF Serving and Hugging Face write them."""

import binascii
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from service.errors import BadRequest, InvalidParameter, UnsupportedImage
from service.http import hints
from service.http.json_pixels import count_up_to

_KEYS = ("image", "images", "instances", "inputs")
"""Members that hold the images: ours, TF Serving's and Hugging Face's."""
_ELEMENT_KEYS = ("b64", "image", "image_bytes", "data")
"""Members of an object that holds one image, such as TF Serving's `{"b64": ...}`."""
_MAX_NESTING = 3
_MARKS_AN_IMAGE = 24
"""Quotes, commas and brackets that one image may need; a data URL has five, TF Serving's longest form sixteen."""
_OTHER_MARKS = 200
_DECODED_CHARACTERS = 1024 * 1024
"""Characters of base64 decoded at once, a multiple of four: decoding holds the interpreter's lock."""
_DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.+-]+=[^;,]{0,100})*;base64,", re.ASCII | re.IGNORECASE)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")

_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ELEMENTS = msgspec.json.Decoder(list[msgspec.Raw])
_STRING = msgspec.json.Decoder(str)
_ANY = msgspec.json.Decoder()

_OF_FILES = ("application/octet-stream", "image/")
"""Media types, by prefix, of a file's bytes."""

FORM = 'write {"image": "<base64>"} or {"images": ["<base64>", ...]}, with options such as model and top_k beside it'
"""What to write in JSON, as errors say it."""


class _Misformed(Exception):
    """JSON whose fault is explained best by the right form."""


def is_json(body: bytes, content_type: str = "") -> bool:
    """Whether a body is meant as JSON: it begins as no image file does, and its Content-Type says nothing else.

    Clients often send JSON without a type, or with that of a form; but what is sent as an image, or as mere bytes, is a
    file that happens to hold JSON.
    """
    return (
        body[:1] in b'{["\t\n\r '
        and body[:64].lstrip()[:1] in (b"{", b"[", b'"')
        and not content_type.lower().startswith(_OF_FILES)
    )


def read_images(
    text: bytes, *, max_images: int, options: Sequence[str], form: str = FORM
) -> tuple[list[bytes], dict[str, Any]]:
    """The encoded images in a JSON body, and which of the `options` it gives, not yet validated.

    `form` says in errors what to write. Raises BadRequest that names the place of a fault and ends with `form`,
    InvalidParameter for a member that means nothing here, and UnsupportedImage for an address in place of an image.
    """
    try:
        return _read(text, max_images, options)
    except _Misformed as error:
        raise BadRequest(f"{error}: {form}") from error


def _read(text: bytes, max_images: int, options: Sequence[str]) -> tuple[list[bytes], dict[str, Any]]:
    _require_few_marks(text, max_images * _MARKS_AN_IMAGE + _OTHER_MARKS)
    start = text[:64].lstrip()
    if start.startswith(b"["):
        return _images(text, "images", max_images), {}
    if start.startswith(b'"'):
        return [_image(text, "image", 0)], {}
    members = _decoded(_MEMBERS, text, "")
    holding = [key for key in _KEYS if key in members]
    if len(holding) != 1:
        given = ", ".join(holding) or "none of them"
        raise _Misformed(f"JSON: exactly one of {', '.join(_KEYS)} must hold the images, got {given}")
    (key,) = holding
    value = bytes(members.pop(key))
    if key == "inputs" and b'"datatype"' in value:
        raise BadRequest("JSON: this is a request of the Open Inference Protocol: POST it to /v2/models/NAME/infer")
    images = _images(value, key, max_images) if value.startswith(b"[") else [_image(value, key, 0)]
    return images, _options(members, options, key)


def _options(members: dict[str, msgspec.Raw], options: Sequence[str], image_key: str) -> dict[str, Any]:
    given = {name: bytes(value) for name, value in members.items()}
    # Hugging Face's place for them.
    parameters = given.pop("parameters", b"null")
    _require_known("JSON", given, [*options, image_key, *(["parameters"] if options else [])])
    if parameters != b"null":
        if not parameters.startswith(b"{"):
            raise _Misformed("JSON: parameters: not an object")
        inner = {name: bytes(value) for name, value in _decoded(_MEMBERS, parameters, "parameters").items()}
        _require_known("JSON: parameters", inner, options)
        given |= inner
    # null counts as not given.
    return {name: _decoded(_ANY, value, name) for name, value in given.items() if value != b"null"}


def _require_known(place: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise InvalidParameter(f"{place}: {hints.unknown_name('member', name, known)}")


def _images(array: bytes, place: str, max_images: int) -> list[bytes]:
    elements = _decoded(_ELEMENTS, array, place)
    if not 1 <= len(elements) <= max_images:
        raise BadRequest(f"JSON: {place}: a request carries 1 to {max_images} images; got {len(elements)}")
    return [_image(bytes(element), f"{place}.{number}", 0) for number, element in enumerate(elements)]


def _image(value: bytes, place: str, nesting: int) -> bytes:
    start = value[:64].lstrip()
    if start.startswith(b'"'):
        return _from_base64(_decoded(_STRING, value, place), place)
    if start.startswith(b"{") and nesting < _MAX_NESTING:
        members = _decoded(_MEMBERS, value, place)
        keys = [key for key in members if key in _ELEMENT_KEYS]
        if len(keys) == len(members) == 1:
            return _image(bytes(members[keys[0]]), f"{place}.{keys[0]}", nesting + 1)
        if any("url" in name.lower() for name in members):
            raise UnsupportedImage(f"JSON: {place}: {hints.NO_URL}")
        raise _Misformed(f"JSON: {place}: an object must hold one image, as base64 in b64")
    if start[:1] in b"[0123456789-":
        raise _Misformed(
            f"JSON: {place}: numbers are not an encoded image, and pixels go to POST /v2/models/NAME/infer"
        )
    raise _Misformed(f"JSON: {place}: not a string in base64")


def _from_base64(text: str, place: str) -> bytes:
    """Base64 with or without padding, line ends and a data URL's prefix, in the standard or the URL-safe alphabet."""
    if hints.is_url(text):
        raise UnsupportedImage(f"JSON: {place}: {hints.NO_URL}")
    if text[:5].lower() == "data:":
        head = _DATA_URL.match(text[:1000])
        if head is None:
            raise BadRequest(f"JSON: {place}: a data URL must be in base64: data:image/jpeg;base64,...")
        text = text[head.end() :]
    try:
        data = text.encode("ascii")
    except UnicodeEncodeError as error:
        raise _Misformed(f"JSON: {place}: not base64") from error
    if b"\n" in data or b"\r" in data or b" " in data:
        data = data.translate(None, b" \t\r\n")
    if b"-" in data or b"_" in data:
        data = data.translate(_URL_SAFE)
    data = data.rstrip(b"=")
    if not data:
        raise _Misformed(f"JSON: {place}: the string is empty")
    data += b"=" * (-len(data) % 4)
    image = bytearray()
    try:
        for start in range(0, len(data), _DECODED_CHARACTERS):
            image += binascii.a2b_base64(data[start : start + _DECODED_CHARACTERS], strict_mode=True)
    except binascii.Error as error:
        raise _Misformed(f"JSON: {place}: not base64 ({hints.shown(text[:60])!r})") from error
    return bytes(image)


def _decoded(decoder: "msgspec.json.Decoder[Any]", text: bytes, place: str) -> Any:
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = str(error).partition(" - at `$")[0]
        raise _Misformed(f"malformed JSON{': ' + place if place else ''}: {message}") from error


def _require_few_marks(text: bytes, limit: int) -> None:
    """Refuse a text of more values than images and options need: each costs an object, and parsing cannot be split."""
    if count_up_to(text, b'",[{', limit) > limit:
        raise _Misformed("JSON: too many values for the images of a request")
