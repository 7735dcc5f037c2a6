"""The body of a classification: an image's bytes, a multipart form, or JSON with base64; each may be compressed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import Request

from service.errors import BadRequest, InvalidParameter, RequestError, UnsupportedImage
from service.http import hints, json_images
from service.http.body import read_body
from service.http.compression import decompress
from service.http.exchange import content_length
from service.http.form import read_form
from service.http.json_images import is_json, read_images
from service.limits import Limits
from service.scheduling.admission import Place
from service.scheduling.decode_pool import DecodePool

_LARGE_BODY = 128 * 1024
"""Taking a larger body apart on the event loop would delay all other requests."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What a body holds."""

    images: list[bytes]
    options: dict[str, Any] = field(default_factory=dict)
    """What else it asks for, by name and not yet validated."""


def least_image_bytes(request: Request) -> int:
    """The least number of bytes of images in a body: base64 makes them a third larger."""
    return 3 * (content_length(request) or 0) // 4


def explained(error: RequestError, image: bytes) -> RequestError:
    """The error of an image, with a hint at what was sent in place of one."""
    hint = hints.for_body(image) if isinstance(error, UnsupportedImage) else None
    return UnsupportedImage(hint) if hint else error


async def read_sent(
    request: Request,
    place: Place,
    limits: Limits,
    decoders: DecodePool,
    option_names: Sequence[str],
    *,
    json_form: str = json_images.FORM,
) -> Sent:
    """Read the body of a classification. Compressed and large bodies are parsed in the decode pool.

    `json_form` says in errors what JSON to write. Raises what `read_body` raises, BadRequest for a malformed or empty
    body, and InvalidParameter for a form field or a JSON member that is not among `option_names`.
    """
    body = await read_body(request, limits, place)
    headers = request.headers
    content_type, encoding = headers.get("content-type", ""), headers.get("content-encoding", "")
    is_form = content_type[:19].lower() == "multipart/form-data"
    if not (is_form or encoding or is_json(body, content_type)):
        if not body:
            raise BadRequest("the body is empty: send an image, for example with curl --data-binary @photo.jpg")
        return Sent([body])
    take_apart: Callable[[], Sent] = partial(_take_apart, body, content_type, encoding, limits, option_names, json_form)
    return await decoders.run(place.state, take_apart) if encoding or len(body) > _LARGE_BODY else take_apart()


def _take_apart(
    body: bytes, content_type: str, encoding: str, limits: Limits, option_names: Sequence[str], json_form: str
) -> Sent:
    body = decompress(body, encoding, max_bytes=limits.max_body_bytes)
    if content_type[:19].lower() == "multipart/form-data":
        images, fields = read_form(
            body, content_type, max_images=limits.max_images_per_request, max_fields=2 * len(option_names)
        )
        for name in fields:
            if name not in option_names:
                raise InvalidParameter(hints.unknown_name("form field", name, option_names))
        return Sent(images, dict(fields))
    if is_json(body, content_type):
        return Sent(*read_images(body, max_images=limits.max_images_per_request, options=option_names, form=json_form))
    if not body:
        raise BadRequest("the body is empty: send an image, for example with curl --data-binary @photo.jpg")
    return Sent([body])
