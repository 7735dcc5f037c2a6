"""Request bodies, read under a byte limit and a time limit."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.errors import BodyTooLarge, BodyTooSlow, ClientDisconnected, DeadlineExceeded
from service.scheduling.admission import Place

T = TypeVar("T")


async def read_body(request: Request, *, max_bytes: int, timeout_seconds: float, place: Place | None = None) -> bytes:
    """The whole body, whatever Content-Type says. Its bytes are held with `place`.

    Raises BodyTooLarge before more than `max_bytes` are held, BodyTooSlow if they take longer than `timeout_seconds`,
    DeadlineExceeded if they have not arrived by the deadline, and Overloaded if all bodies together are too large.
    """

    async def joined() -> bytes:
        return b"".join([chunk async for chunk in _chunks(request, max_bytes, place)])

    return await _in_time(joined(), timeout_seconds, place)


async def _in_time(reading: Coroutine[Any, Any, T], timeout_seconds: float, place: Place | None) -> T:
    left = place.state.deadline - time.perf_counter() if place else math.inf
    try:
        async with asyncio.timeout(min(timeout_seconds, left)):
            return await reading
    except TimeoutError as error:
        if left <= timeout_seconds:
            raise DeadlineExceeded("the deadline passed before the body had arrived: nothing was computed") from error
        raise BodyTooSlow(f"the body did not arrive within {timeout_seconds:g} s: send it again") from error


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
