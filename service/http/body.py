"""Request bodies, read under a byte limit and a time limit: raw bytes, or multipart with one or many files."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from service.errors import BadRequest, BodyTooLarge, BodyTooSlow, ClientDisconnected, DeadlineExceeded
from service.http.exchange import content_length
from service.pipeline import Inputs, Limits
from service.scheduling.admission import Place

T = TypeVar("T")

_MAX_FIELD_BYTES = 4096
_CLOCKS_DIFFER_SECONDS = 0.002
"""A loop's timer may be early by so much on the clock of deadlines."""


class Pace:
    """Whether a body arrives fast enough: `rate` bytes per second or more in each window of so many seconds.

    So a client that sends fast and then stops is noticed as soon as one that is slow from the start.
    """

    def __init__(self, rate: float, window_seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """A `rate` of 0 accepts every pace."""
        self._rate, self._window, self._clock = rate, window_seconds, clock
        self._ends, self._received = clock() + window_seconds, 0

    def received(self, count: int) -> None:
        """Record that so many bytes have arrived."""
        self._received += count

    def too_slow(self) -> bool:
        """Whether the window that has ended brought too little; the next one begins. False while one lasts."""
        now = self._clock()
        if now < self._ends:
            return False
        late, slow = now - self._ends, self._received < self._rate * self._window
        self._ends, self._received = now + self._window, 0
        # If this process was stopped or busy for so long, the bytes may have arrived without being read.
        return slow and late < self._window / 2

    @property
    def left_seconds(self) -> float:
        """Seconds until the window ends."""
        return self._ends - self._clock()

    @property
    def text(self) -> str:
        """What is asked of a client."""
        return f"{self._rate:g} bytes per second, measured over {self._window:g} s"


async def read_body(request: Request, limits: Limits, place: Place) -> bytes:
    """The whole body, whatever Content-Type says. Its bytes are held with `place`.

    Raises BodyTooLarge before more than `max_body_bytes` are held, BodyTooSlow if they arrive too slowly,
    DeadlineExceeded if they have not arrived by the deadline, and Overloaded if all bodies together are too large.
    """
    reading = _Reading(request, limits, place)
    return await reading.in_time(reading.joined())


async def read_small_body(request: Request, *, max_bytes: int, timeout_seconds: float) -> bytes:
    """The whole body of a request that is not admitted first. Raises BodyTooLarge or BodyTooSlow."""
    try:
        async with asyncio.timeout(timeout_seconds):
            return b"".join([chunk async for chunk in _chunks(request, max_bytes)])
    except TimeoutError as error:
        raise BodyTooSlow(f"the body did not arrive within {timeout_seconds:g} s: send it again") from error


async def read_images(request: Request, limits: Limits, place: Place) -> Inputs:
    """The images of a request: its files if it is multipart, else its whole body as one image.

    Raises what `read_body` raises, and BadRequest for a malformed or empty body.
    """
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        reading = _Reading(request, limits, place)
        return Inputs(images=await reading.in_time(_read_multipart(request, limits, reading.chunks())))
    body = await read_body(request, limits, place)
    if not body:
        raise BadRequest("the body is empty: send an image, for example with curl --data-binary @photo.jpg")
    return Inputs(images=[body])


class _Reading:
    """The reading of one body, which ends when it takes too long."""

    def __init__(self, request: Request, limits: Limits, place: Place) -> None:
        self._request, self._place, self._max_bytes = request, place, limits.max_body_bytes
        self._pace = Pace(limits.min_upload_rate, limits.upload_window_seconds)
        now = time.perf_counter()
        self._ends = min(now + limits.body_timeout_seconds, place.state.deadline)
        self._at_deadline = self._ends == place.state.deadline
        self._seconds = limits.body_timeout_seconds
        self._error: DeadlineExceeded | BodyTooSlow = DeadlineExceeded(
            "the deadline passed before the body had arrived: nothing was computed"
        )
        self._timer: asyncio.TimerHandle | None = None

    async def joined(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives."""
        async for chunk in _chunks(self._request, self._max_bytes, self._place):
            self._pace.received(len(chunk))
            yield chunk

    async def in_time(self, reading: Coroutine[Any, Any, T]) -> T:
        """The result of `reading`. Raises DeadlineExceeded or BodyTooSlow instead if it takes too long."""
        try:
            async with asyncio.timeout(None) as timeout:
                self._watch(timeout)
                return await reading
        except TimeoutError as error:
            raise self._error from error
        finally:
            if self._timer:
                self._timer.cancel()

    def _watch(self, timeout: asyncio.Timeout) -> None:
        loop = asyncio.get_running_loop()

        def check() -> None:
            if time.perf_counter() >= self._ends:
                if not self._at_deadline:
                    self._error = BodyTooSlow(f"the body did not arrive within {self._seconds:g} s: send it again")
            elif self._pace.too_slow():
                self._error = BodyTooSlow(
                    f"the body must arrive at {self._pace.text}: send it again over a faster connection"
                )
            else:
                self._watch(timeout)
                return
            timeout.reschedule(loop.time())

        left = min(self._ends - time.perf_counter(), self._pace.left_seconds)
        self._timer = loop.call_later(max(0.0, left) + _CLOCKS_DIFFER_SECONDS, check)


async def _read_multipart(request: Request, limits: Limits, chunks: AsyncGenerator[bytes, None]) -> list[bytes]:
    parser = MultiPartParser(
        request.headers,
        chunks,
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


async def _chunks(request: Request, max_bytes: int, place: Place | None = None) -> AsyncGenerator[bytes, None]:
    declared = content_length(request)
    if declared is not None:
        if declared > max_bytes:
            raise BodyTooLarge(f"the body has {declared:,} bytes; the limit is {max_bytes:,}")
        if place:
            # Rather now than after most of it was sent.
            place.expect_bytes(declared)
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
