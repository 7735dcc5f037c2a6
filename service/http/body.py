"""Request bodies, read under a byte limit: raw bytes, or multipart with one or many files."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from service.errors import BadRequest, BodyTooLarge, BodyTooSlow, ClientDisconnected, DeadlineExceeded

_MAX_FIELD_BYTES = 4096

Hold = Callable[[int], None]
"""Is told of every piece before it is kept, and may raise."""


async def read_body(
    request: Request, *, max_bytes: int, seconds: float, hold: Hold, deadline: float = math.inf
) -> bytes:
    """The whole body, whatever Content-Type says.

    Raises BodyTooLarge before more than `max_bytes` are held, BodyTooSlow if they take more than `seconds` to arrive,
    and DeadlineExceeded if they have not arrived by `deadline`, on `time.perf_counter`'s clock.
    """
    _refuse_declared(request, max_bytes)
    try:
        async with asyncio.timeout(min(seconds, deadline - time.perf_counter())):
            return b"".join([chunk async for chunk in _limited(request, max_bytes, hold)])
    except TimeoutError as error:
        raise _too_late(seconds, deadline) from error


async def read_images(
    request: Request,
    *,
    max_bytes: int,
    max_images_per_request: int,
    seconds: float,
    hold: Hold,
    deadline: float = math.inf,
) -> list[bytes]:
    """The images of a request: its files if it is multipart, else its whole body as one image.

    Raises what `read_body` raises, and BadRequest for a malformed or empty body.
    """
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        _refuse_declared(request, max_bytes)
        try:
            async with asyncio.timeout(min(seconds, deadline - time.perf_counter())):
                return await _read_multipart(
                    request, max_bytes=max_bytes, max_images_per_request=max_images_per_request, hold=hold
                )
        except TimeoutError as error:
            raise _too_late(seconds, deadline) from error
    body = await read_body(request, max_bytes=max_bytes, seconds=seconds, hold=hold, deadline=deadline)
    if not body:
        raise BadRequest("the body is empty: send an image, for example with curl --data-binary @photo.jpg")
    return [body]


def _too_late(seconds: float, deadline: float) -> BodyTooSlow | DeadlineExceeded:
    if time.perf_counter() >= deadline:
        return DeadlineExceeded("the deadline passed before the body had arrived: nothing was computed")
    return BodyTooSlow(f"the body did not arrive within {seconds:g} s: send it again")


def _refuse_declared(request: Request, max_bytes: int) -> None:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise BodyTooLarge(f"the body has {int(declared):,} bytes; the limit is {max_bytes:,}")


async def _read_multipart(request: Request, *, max_bytes: int, max_images_per_request: int, hold: Hold) -> list[bytes]:
    parser = MultiPartParser(
        request.headers,
        _limited(request, max_bytes, hold),
        max_files=max_images_per_request,
        max_fields=max_images_per_request,
        # Of a field, which nobody reads: Starlette decodes it with a codec of the client's choice, some of them slow.
        max_part_size=_MAX_FIELD_BYTES,
    )
    # Hold files in memory: the whole body is limited, and nothing of a request belongs on the disk.
    parser.spool_max_size = max_bytes
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


async def _limited(request: Request, max_bytes: int, hold: Hold) -> AsyncGenerator[bytes, None]:
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > max_bytes:
                raise BodyTooLarge(f"the body exceeds the limit of {max_bytes:,} bytes")
            hold(len(chunk))
            yield chunk
    except ClientDisconnect as error:
        raise ClientDisconnected("the client hung up before the end of the body") from error
