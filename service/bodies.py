"""Request bodies, read under a byte limit: raw image bytes, or multipart with one or many files."""

import asyncio
from collections.abc import AsyncGenerator

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from service.errors import BadRequest, BodyTooLarge, BodyTooSlow


async def read_images(request: Request, *, max_bytes: int, max_images: int, seconds: float) -> list[bytes]:
    """The images of a request: its files if it is multipart, else its whole body, whatever Content-Type says.

    Raises BodyTooLarge before more than `max_bytes` are held, BodyTooSlow if they take more than `seconds` to arrive,
    and BadRequest for a malformed or empty body.
    """
    try:
        async with asyncio.timeout(seconds):
            return await _read(request, max_bytes=max_bytes, max_images=max_images)
    except TimeoutError as error:
        raise BodyTooSlow(f"the body did not arrive within {seconds:g} s: send it again") from error


async def _read(request: Request, *, max_bytes: int, max_images: int) -> list[bytes]:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise BodyTooLarge(f"the body has {int(declared):,} bytes; the limit is {max_bytes:,}")
    content_type = request.headers.get("content-type", "")
    if content_type.lower().startswith("multipart/form-data"):
        return await _read_multipart(request, max_bytes=max_bytes, max_images=max_images)
    body = b"".join([chunk async for chunk in _limited(request, max_bytes)])
    if not body:
        raise BadRequest("the body is empty: send an image, for example with curl --data-binary @photo.jpg")
    return [body]


async def _read_multipart(request: Request, *, max_bytes: int, max_images: int) -> list[bytes]:
    parser = MultiPartParser(
        request.headers,
        _limited(request, max_bytes),
        max_files=max_images,
        max_fields=max_images,
        max_part_size=max_bytes,
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


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > max_bytes:
                raise BodyTooLarge(f"the body exceeds the limit of {max_bytes:,} bytes")
            yield chunk
    except ClientDisconnect as error:
        raise BadRequest("the client hung up before the end of the body") from error
