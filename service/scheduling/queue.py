"""The queue of one model: its images that wait for the engine, in the order of their requests' keys."""

import asyncio
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.scheduling.backlog import Backlog
from service.scheduling.cost import Cost, Load
from service.scheduling.outputs import Output, Pixels, RunBatch
from service.scheduling.request import Key, RequestState


@dataclass(slots=True, eq=False, kw_only=True)
class Entry:
    """An image that is decoded, waits for the engine, or is computed."""

    state: RequestState
    answer: asyncio.Future[Output]
    pixels: Pixels | None = None
    """None until it is decoded."""
    since: float = 0.0
    """When it was decoded, and could be computed."""
    decode_seconds: float = 0.0
    soon: bool = False
    """Whether it counts as about to come, while it is not decoded. For the scheduler, under its lock."""
    queued: bool = False
    """Whether it is in its queue. Changed by the queue, under the scheduler's lock."""
    alone: bool = False
    """Whether it is to be run in a batch of its own, because the batch that it was in has failed."""

    def over(self, now: float) -> bool:
        """Whether nobody waits for it any longer."""
        return self.answer.done() or self.state.over(now)

    def settle(self, result: Output | BaseException) -> None:
        """Give it its result, unless its caller has left or has got an error. On the event loop."""
        if self.answer.done():
            return
        if isinstance(result, Output):
            self.answer.set_result(result)
        elif isinstance(result, asyncio.CancelledError):
            self.answer.cancel()
        else:
            self.answer.set_exception(result)


_Waiting = tuple[Key, int, Entry]


class Queue:
    """The images of one model that wait for the engine."""

    def __init__(
        self,
        name: str,
        run: RunBatch,
        cost: Cost,
        *,
        version: int | None = None,
        classes: int | None = None,
        any_thread: bool = True,
    ) -> None:
        """`run` is called with a batch and the number of threads that are to compute it, on the engine's lanes, or
        with `any_thread` also on a decoder's thread. It must give outputs of `classes` (None: of any number)."""
        self.name, self.classes, self.any_thread = name, classes, any_thread
        self.title = f"model {name!r}" + (f" version {version}" if version else "")
        """For messages."""
        self.run = run
        self.cost = cost
        self.backlog = Backlog()
        self._heaps: tuple[list[_Waiting], list[_Waiting]] = [], []
        """Interactive and batch images."""
        self._numbers = itertools.count()
        self._buffers: dict[tuple[int, int], Pixels] = {}
        """By lane and size."""

    def __len__(self) -> int:
        return len(self._heaps[0]) + len(self._heaps[1])

    def waits(self, *, batch: bool) -> bool:
        """Whether images of the priority class wait."""
        return bool(self._heaps[batch])

    def head(self, *, batch_first: bool = False) -> Key:
        """Key of the next image. There must be one."""
        interactive, batch = self._heaps
        return (batch if batch and (batch_first or not interactive) else interactive)[0][0]

    def rank(self, *, batch_first: bool) -> tuple[bool, Key]:
        """Its place among the queues, by what it would run next. There must be an image."""
        head = self.head(batch_first=batch_first)
        return batch_first and not head.batch, head

    def holds(self, now: float, load: Load) -> bool:
        """Whether the next batch should wait for images that are about to be decoded.

        Only while more images are in the decode pool than its threads can work on, there is room in the batch, and the
        deadline of the most urgent image leaves time to decode a full batch and to run two.
        """
        limit, head, decoding = self.cost.limit, self.head(), self.backlog.decoding
        if decoding[False] + (decoding[True] if head.batch else 0) <= load.decode_threads or len(self) >= limit:
            return False
        return head.deadline - now > limit * load.decode_seconds + 2 * self.cost.seconds(limit)

    def push(self, entry: Entry) -> None:
        """Add an image."""
        entry.queued = True
        heapq.heappush(self._heaps[entry.state.key.batch], (entry.state.key, next(self._numbers), entry))

    def discard(self, entry: Entry) -> None:
        """Take an image out, if it is there."""
        if entry.queued:
            self._take_out([entry])

    def drop_expired(self, now: float) -> list[Entry]:
        """Take out all images that nobody waits for or that are too late, wherever they stand in the queue."""
        over = [entry for heap in self._heaps for _, _, entry in heap if entry.over(now)]
        self._take_out(over)
        return over

    def clear(self) -> list[Entry]:
        """Take out all images."""
        entries = [entry for heap in self._heaps for _, _, entry in heap]
        self._take_out(entries)
        return entries

    def pop(self, images: int, now: float, *, batch_first: bool = False) -> tuple[list[Entry], list[Entry]]:
        """Take out the next batch of at most `images` images, the most urgent first, and the expired ones found on the
        way."""
        batch: list[Entry] = []
        over: list[Entry] = []
        for heap in reversed(self._heaps) if batch_first else self._heaps:
            while heap and len(batch) < images:
                if batch and (batch[0].alone or heap[0][2].alone):
                    return batch, over
                entry = heapq.heappop(heap)[2]
                entry.queued = False
                (over if entry.over(now) else batch).append(entry)
        return batch, over

    def fill(self, batch: Sequence[Entry], size: int, lane: int) -> Pixels:
        """The batch as one array, padded with black to the size. Valid until the next call for the same lane."""
        images = [entry.pixels for entry in batch if entry.pixels is not None]
        if size == 1:
            return images[0][np.newaxis]
        pixels = self._buffers.get((lane, size))
        if pixels is None:
            pixels = self._buffers[lane, size] = np.zeros((size, *images[0].shape), dtype=np.uint8)
        for row, image in enumerate(images):
            pixels[row] = image
        pixels[len(batch) :] = 0
        return pixels

    def _take_out(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        for entry in entries:
            entry.queued = False
        for heap in self._heaps:
            if any(not place[2].queued for place in heap):
                heap[:] = [place for place in heap if place[2].queued]
                heapq.heapify(heap)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch that was run, as it is reported to an observer."""

    queue: Queue
    images: int
    size: int
    """Rows computed by the engine: `images` and padding."""
    seconds: float
    threads: int = 1
    """Threads that computed it."""
    faults: Sequence[Exception] = ()
    """Why images were not answered, one for each of them."""
    retried: Exception | None = None
    """Why the whole batch failed, so that its images are run again, each alone."""
    hung: bool = False
    """Whether the watchdog had given it up: its duration says nothing about the next one."""

    @property
    def failed(self) -> bool:
        """Whether nothing of the batch was answered."""
        return self.retried is not None or len(self.faults) == self.images
