"""Request bodies, read under a byte limit and a time limit."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.errors import BodyTooLarge, BodyTooSlow, ClientDisconnected, DeadlineExceeded
from service.http.exchange import content_length
from service.limits import Limits
from service.scheduling.admission import Place

T = TypeVar("T")

_CLOCKS_DIFFER_SECONDS = 0.002
"""By how much a timer of the event loop may be early on the clock of deadlines."""


class Pace:
    """Whether a body arrives fast enough: `rate` bytes per second or more in each window of `window_seconds`.

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
        """Whether too little arrived in the window that has ended; starts the next one. False while a window lasts."""
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
        """What is required of a client."""
        return f"{self._rate:g} bytes per second, measured over {self._window:g} s"


async def read_body(request: Request, limits: Limits, place: Place) -> bytes:
    """The whole body, whatever Content-Type says. `place` accounts for its bytes.

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


class _Reading:
    """Reads one body, and gives up when that takes too long."""

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


async def _chunks(request: Request, max_bytes: int, place: Place | None = None) -> AsyncGenerator[bytes, None]:
    declared = content_length(request)
    if declared is not None:
        if declared > max_bytes:
            raise BodyTooLarge(f"the body has {declared:,} bytes; the limit is {max_bytes:,}")
        if place:
            # Better now than after most of it was sent.
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
