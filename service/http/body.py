"""Request bodies, read under a byte limit and a time limit: raw bytes, or multipart with one or many files."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from service.errors import BadRequest, BodyTooLarge, BodyTooSlow, ClientDisconnected, DeadlineExceeded
from service.pipeline import Inputs, Limits
from service.scheduling.admission import Place

T = TypeVar("T")

_MAX_FIELD_BYTES = 4096


async def read_body(request: Request, *, max_bytes: int, timeout_seconds: float, place: Place | None = None) -> bytes:
    """The whole body, whatever Content-Type says. Its bytes are held with `place`.

    Raises BodyTooLarge before more than `max_bytes` are held, BodyTooSlow if they take longer than `timeout_seconds`,
    DeadlineExceeded if they have not arrived by the deadline, and Overloaded if all bodies together are too large.
    """

    async def joined() -> bytes:
        return b"".join([chunk async for chunk in _chunks(request, max_bytes, place)])

    return await _in_time(joined(), timeout_seconds, place)


async def read_images(request: Request, limits: Limits, place: Place) -> Inputs:
    """The images of a request: its files if it is multipart, else its whole body as one image.

    Raises what `read_body` raises, and BadRequest for a malformed or empty body.
    """
    timeout_seconds = limits.body_timeout_seconds
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return Inputs(images=await _in_time(_read_multipart(request, limits, place), timeout_seconds, place))
    body = await read_body(request, max_bytes=limits.max_body_bytes, timeout_seconds=timeout_seconds, place=place)
    if not body:
        raise BadRequest("the body is empty: send an image, for example with curl --data-binary @photo.jpg")
    return Inputs(images=[body])


async def _in_time(reading: Coroutine[Any, Any, T], timeout_seconds: float, place: Place | None) -> T:
    left = place.state.deadline - time.perf_counter() if place else math.inf
    try:
        async with asyncio.timeout(min(timeout_seconds, left)):
            return await reading
    except TimeoutError as error:
        if left <= timeout_seconds:
            raise DeadlineExceeded("the deadline passed before the body had arrived: nothing was computed") from error
        raise BodyTooSlow(f"the body did not arrive within {timeout_seconds:g} s: send it again") from error


async def _read_multipart(request: Request, limits: Limits, place: Place) -> list[bytes]:
    parser = MultiPartParser(
        request.headers,
        _chunks(request, limits.max_body_bytes, place),
        max_files=limits.max_images_per_request,
        max_fields=limits.max_images_per_request,
        # Fields are not used, but Starlette decodes them with a codec of the client's choice, and some are slow.
        max_part_size=_MAX_FIELD_BYTES,
    )
    # Keep files in memory: the whole body is limited, and nothing of a request belongs on the disk.
    parser.spool_max_size = limits.max_body_bytes
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise BadRequest(f"malformed multipart body: {error.message}") from error
    except (KeyError, ValueError, UnicodeError) as error:
        raise BadRequest("malformed multipart body: its boundary or a part's head cannot be read") from error
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise BadRequest("the multipart body has no file: send one with curl -F image=@photo.jpg")
        return [await file.read() for file in files]
    finally:
        await form.close()


async def _chunks(request: Request, max_bytes: int, place: Place | None) -> AsyncGenerator[bytes, None]:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise BodyTooLarge(f"the body has {int(declared):,} bytes; the limit is {max_bytes:,}")
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > max_bytes:
                raise BodyTooLarge(f"the body exceeds the limit of {max_bytes:,} bytes")
            if place:
                place.hold_bytes(len(chunk))
            yield chunk
    except ClientDisconnect as error:
        raise ClientDisconnected("the client closed the connection before the end of the body") from error
