"""Work that no answer waits for: images that the engine computes only while no accepted image is unanswered.

The scheduler asks for it when it has found nothing else to do: no image waits, is decoded, or is computed, and no core
is taken. Then one image is computed, alone, or decoded if it is not pixels yet. So an answer waits for at most one such
step, the one that had begun when its request came.

What waits here is bounded in images and bytes, and what does not fit is dropped. Whatever becomes of an image, its
future is done in the end, and only that frees what it holds.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from service.scheduling.lanes import Job, Running
from service.scheduling.loop_calls import call_on_loop
from service.scheduling.outputs import Output, Pixels
from service.scheduling.queue import Entry, Queue
from service.scheduling.request import RequestState

Dropped = Literal["full", "bytes", "unloaded", "ended"]
Outcome = Output | BaseException | Dropped
_NEVER = 1e9
"""Seconds: nobody waits for it."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Image:
    queue: Queue
    entry: Entry
    threads: int
    nbytes: int
    decode: Callable[[], Pixels] | None
    decode_seconds: float
    """As predicted."""
    dropped: Dropped | None = None


class Spare:
    """Waiting images. `put` and its callbacks run on the event loop; `take` is called by lanes under their lock."""

    def __init__(self, *, max_images: int, max_bytes: int) -> None:
        self._max_images, self._max_bytes = max_images, max_bytes
        self._waiting: deque[_Image] = deque()
        self._held: set[_Image] = set()
        """Waiting and running ones, until they are done."""
        self.bytes = 0
        """Bytes of images and pixels that are held."""

    @property
    def images(self) -> int:
        """Images that wait or run."""
        return len(self._held)

    @property
    def waiting(self) -> bool:
        """Whether any image waits to be begun."""
        return bool(self._waiting)

    def put(
        self,
        queue: Queue,
        *,
        nbytes: int,
        threads: int,
        done: Callable[[Outcome], None],
        pixels: Callable[[], Pixels] | None = None,
        decode: Callable[[], Pixels] | None = None,
        decode_seconds: float = 0.0,
    ) -> None:
        """Have an image computed with `threads` threads, when there is nothing else to do.

        `pixels` gives a copy of its pixels and is called only if there is room for `nbytes`; instead, `decode` makes
        them of bytes that it holds, on a lane. `done` is called once, on the event loop: with the output, the error, or
        why the image was dropped.
        """
        if len(self._held) >= self._max_images or self.bytes + nbytes > self._max_bytes:
            done("full" if len(self._held) >= self._max_images else "bytes")
            return
        entry = Entry(
            state=RequestState(seconds=_NEVER, priority="batch"), answer=asyncio.get_running_loop().create_future()
        )
        if pixels is not None:
            entry.pixels = pixels()
        image = _Image(
            queue=queue,
            entry=entry,
            threads=threads,
            nbytes=nbytes,
            decode=decode,
            decode_seconds=decode_seconds,
        )
        self.bytes += nbytes
        self._held.add(image)

        def settled(answer: "asyncio.Future[Output]") -> None:
            self._held.discard(image)
            self.bytes -= nbytes
            image.decode = entry.pixels = None
            if answer.cancelled():
                done(image.dropped or "ended")
            else:
                done(answer.exception() or answer.result())

        entry.answer.add_done_callback(settled)
        self._waiting.append(image)

    def take(self, queues: Sequence[Queue], now: float) -> Running | None:
        """The next step: an image to compute, or to decode first. None if none waits."""
        while self._waiting:
            image = self._waiting[0]
            entry, queue = image.entry, image.queue
            if entry.answer.done():
                self._waiting.popleft()
            elif not any(queue is other for other in queues):
                self._waiting.popleft()
                self._drop(image, "unloaded")
            elif image.decode is not None:
                self._waiting.popleft()
                return self._decoding(image, image.decode, now)
            else:
                self._waiting.popleft()
                entry.since = now
                seconds = queue.cost.seconds(queue.cost.padded(1, image.threads), image.threads)
                return Running(
                    what=f"a spare image of {queue.title}, predicted to take {seconds:.3g} s",
                    started=now,
                    predicted=seconds,
                    cores=image.threads,
                    device_seconds=seconds,
                    queue=queue,
                    entries=[entry],
                )
        return None

    def clear(self, reason: Dropped = "ended", *, queue: Queue | None = None) -> None:
        """Drop what waits, or only that of one queue; what runs ends by itself. Under the scheduler's lock."""
        dropped = [image for image in self._waiting if queue in (None, image.queue)]
        self._waiting = deque(image for image in self._waiting if image not in dropped)
        for image in dropped:
            self._drop(image, reason)

    def _drop(self, image: _Image, reason: Dropped) -> None:
        image.dropped = reason
        call_on_loop(image.entry.answer.get_loop(), image.entry.settle, asyncio.CancelledError())

    def _decoding(self, image: _Image, decode: Callable[[], Pixels], now: float) -> Running:
        job = Job(decode, 1)

        def decoded(future: "Future[Any]") -> None:
            # On the lane, which looks for its next step afterwards, or on the event loop if the engine hangs.
            if error := future.exception():
                call_on_loop(image.entry.answer.get_loop(), image.entry.settle, error)
            else:
                image.decode, image.entry.pixels = None, future.result()
                self._waiting.appendleft(image)

        job.done.add_done_callback(decoded)
        return Running(
            what=f"the decoding of a spare image of {image.queue.title}",
            started=now,
            predicted=image.decode_seconds,
            cores=1,
            device_seconds=image.decode_seconds,
            job=job,
        )
