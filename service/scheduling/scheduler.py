"""Dynamic batching: the images waiting when the engine becomes free are the next batch.

There is one queue per model, and one thread for all engines, so that two models never compete for the same cores. The
thread takes its batches itself: a free engine does not wait for the event loop's next turn. There is no timer and no
polling: a single image starts at once, and batches form while the engine is busy. The order is priority, then deadline,
then arrival; batch work keeps a share of the turns. Requests whose client has left or whose deadline has passed are
dropped before a batch is formed.

A free engine waits for one thing only: images that wait for a decoder. Then every core is busy, a batch of one would
take a decoder's core at the highest cost per image, and the next image is about to be decoded. See `Queue.holds`.
"""

import asyncio
import heapq
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from service.scheduling.backlog import Backlog
from service.scheduling.cost import Cost, Load
from service.scheduling.request import Key, RequestState
from service.scheduling.turns import BATCH_SHARE, Turns

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]
Outputs = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
RunBatch = Callable[[Pixels], Outputs]


@dataclass(slots=True, kw_only=True)
class Output:
    """The outputs for one image, (num_classes,) each, and its time in each stage."""

    logits: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]
    queue_ms: float
    inference_ms: float
    decode_ms: float = 0.0
    """Set by those who decoded it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch that was run, as it is reported to an observer."""

    queue: "Queue"
    images: int
    size: int
    """Rows computed by the engine: `images` and padding."""
    seconds: float
    failed: bool


@dataclass(slots=True, kw_only=True)
class _Entry:
    state: RequestState
    pixels: Pixels
    answer: asyncio.Future[Output]
    since: float


_Waiting = tuple[Key, int, _Entry]


class Queue:
    """The images of one model that wait for the engine."""

    def __init__(self, name: str, run: RunBatch, cost: Cost) -> None:
        """`run` is called on the engine thread only."""
        self.name = name
        self.run = run
        self.cost = cost
        self.running: tuple[float, float] | None = None
        """Start of the running batch on the scheduler's clock, and its predicted seconds."""
        self.backlog = Backlog()
        self._heaps: tuple[list[_Waiting], list[_Waiting]] = [], []
        """Interactive and batch images."""
        self._numbers = itertools.count()
        self._buffers: dict[int, Pixels] = {}

    def __len__(self) -> int:
        return len(self._heaps[0]) + len(self._heaps[1])

    def waits(self, *, batch: bool) -> bool:
        """Whether images of the priority class wait."""
        return bool(self._heaps[batch])

    def head(self, *, batch_first: bool = False) -> Key:
        """Key of the next image. There must be one."""
        interactive, batch = self._heaps
        return (batch if batch and (batch_first or not interactive) else interactive)[0][0]

    def holds(self, now: float, load: Load) -> bool:
        """Whether the next batch should wait for images that are about to be decoded.

        Only while more images are in the decode pool than its threads can work on, there is room in the batch, and the
        deadline of the most urgent image leaves time to decode a full batch and to run two.
        """
        limit, head, decoding = self.cost.limit, self.head(), self.backlog.decoding
        if decoding[False] + (decoding[True] if head.batch else 0) <= load.decode_threads or len(self) >= limit:
            return False
        return head.deadline - now > limit * load.decode_seconds + 2 * self.cost.seconds(limit)

    def push(self, entry: _Entry) -> None:
        """Add an image."""
        heapq.heappush(self._heaps[entry.state.key.batch], (entry.state.key, next(self._numbers), entry))

    def drop_expired(self, now: float) -> list[_Entry]:
        """Take out all images that nobody waits for or that are too late, wherever they stand in the queue."""
        dropped: list[_Entry] = []
        for heap in self._heaps:
            if over := [entry for _, _, entry in heap if _is_over(entry, now)]:
                gone = {id(entry) for entry in over}
                heap[:] = [place for place in heap if id(place[2]) not in gone]
                heapq.heapify(heap)
                dropped += over
        return dropped

    def pop(self, now: float, *, batch_first: bool = False) -> tuple[list[_Entry], list[_Entry]]:
        """Take out the images of the next batch, the most urgent first, and the expired ones found on the way."""
        batch: list[_Entry] = []
        over: list[_Entry] = []
        for heap in reversed(self._heaps) if batch_first else self._heaps:
            while heap and len(batch) < self.cost.limit:
                entry = heapq.heappop(heap)[2]
                (over if _is_over(entry, now) else batch).append(entry)
        if batch and not len(self):
            taken = self.cost.take(len(batch))
            for entry in batch[taken:]:
                self.push(entry)
            batch = batch[:taken]
        return batch, over

    def fill(self, batch: list[_Entry]) -> Pixels:
        """The batch as one array, padded with black to a warmed-up size. Valid until the next call."""
        size = self.cost.padded(len(batch))
        shape = batch[0].pixels.shape
        if size not in self._buffers:
            self._buffers[size] = np.zeros((size, *shape), dtype=np.uint8)
        pixels = self._buffers[size]
        for row, entry in enumerate(batch):
            pixels[row] = entry.pixels
        pixels[len(batch) :] = 0
        return pixels

    def settle(self, entry: _Entry, outcome: Output | Exception) -> None:
        """Give an image that was taken out its outcome. On the event loop."""
        self.backlog.answered(entry.state)
        if entry.answer.done():
            return
        if isinstance(outcome, Output):
            entry.answer.set_result(outcome)
        else:
            entry.answer.set_exception(outcome)


def _rank(queue: Queue, batch_first: bool) -> tuple[bool, Key]:
    """The order of queues by what they would run next."""
    head = queue.head(batch_first=batch_first)
    return batch_first and not head.batch, head


def _is_over(entry: _Entry, now: float) -> bool:
    return entry.answer.done() or entry.state.over(now)


class Scheduler:
    """Start with `start`, stop with `close`; both on the event loop that calls `submit`."""

    def __init__(self, load: Load, *, batch_share: float = BATCH_SHARE) -> None:
        """`load`: that of the machine which decoders and engines share."""
        self._turns = Turns(batch_share)
        self.queues: list[Queue] = []
        self._load, self._clock = load, load.clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_batch: Callable[[Batch], None] = lambda _: None
        # Guards the queues' heaps and the jobs; the engine thread sleeps on it.
        self._change = threading.Condition()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def start(self, on_batch: Callable[[Batch], None] | None = None) -> None:
        """Begin to run batches; `on_batch` is called with each."""
        self._on_batch = on_batch or self._on_batch
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Stop after the running batch. Images still waiting are cancelled."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        await asyncio.to_thread(self._thread.join)
        for queue in self.queues:
            self.remove(queue)

    def add(self, queue: Queue) -> Queue:
        """Serve one more queue."""
        self.queues = [*self.queues, queue]
        return queue

    def remove(self, queue: Queue) -> None:
        """Stop serving a queue to which nothing will be submitted any more. Images still waiting are cancelled."""
        self.queues = [other for other in self.queues if other is not queue]
        with self._change:
            # By then every deadline has passed.
            abandoned = queue.drop_expired(math.inf)
        for entry in abandoned:
            entry.answer.cancel()

    def wake(self) -> None:
        """Check again whether a batch can start: an image has left the decode pool."""
        with self._change:
            self._change.notify()

    def on_engine(self, work: Callable[[], T]) -> T:
        """Call `work` on the engine thread, between batches, and wait for its result. Not from the event loop."""
        done: Future[T] = Future()
        with self._change:
            if self._closing:
                raise RuntimeError("the engine thread has ended")
            self._jobs.append((work, done))
            self._change.notify()
        return done.result()

    async def submit(self, queue: Queue, pixels: Pixels, state: RequestState) -> Output:
        """The outputs for one image. Raises DeadlineExceeded, ClientDisconnected, or the engine's error for its batch.

        A cancelled caller takes its own image out of the queue and no other.
        """
        answer = asyncio.get_running_loop().create_future()
        entry = _Entry(state=state, pixels=pixels, answer=answer, since=self._clock())
        with self._change:
            queue.push(entry)
            self._change.notify()
        return await entry.answer

    def _work(self) -> None:
        """The main loop of the engine thread."""
        while True:
            with self._change:
                while not (self._jobs or self._closing or (found := self._next_batch())):
                    self._change.wait()
                job = self._jobs.popleft() if self._jobs else None
                if job is None and self._closing:
                    return
            if job is not None:
                _run_job(*job)
            elif found:
                self._run_batch(*found)

    def _run_batch(self, queue: Queue, batch: list[_Entry]) -> None:
        size = queue.cost.padded(len(batch))
        started = self._clock()
        queue.running = started, queue.cost.seconds(size)
        outcome: Outputs | Exception
        try:
            outcome = queue.run(queue.fill(batch))
        except Exception as error:  # noqa: BLE001 (it is raised in the callers, and the thread goes on)
            outcome = error
        seconds = self._clock() - started
        queue.running = None

        def finish() -> None:
            failed = isinstance(outcome, Exception)
            if not failed:
                queue.cost.observe(size, seconds)
            self._on_batch(Batch(queue=queue, images=len(batch), size=size, seconds=seconds, failed=failed))
            for row, entry in enumerate(batch):
                if isinstance(outcome, Exception):
                    queue.settle(entry, outcome)
                    continue
                output = Output(
                    logits=outcome[0][row],
                    probabilities=outcome[1][row],
                    queue_ms=(started - entry.since) * 1000,
                    inference_ms=seconds * 1000,
                )
                queue.settle(entry, output)

        self._on_loop(finish)

    def _next_batch(self) -> tuple[Queue, list[_Entry]] | None:
        """The most urgent images, all of one model; None if there is nothing to do now."""
        if self._loop is None:
            return None
        now = self._clock()
        for queue in self.queues:
            self._drop(queue, queue.drop_expired(now))
        ready = [queue for queue in self.queues if len(queue) and not queue.holds(now, self._load)]
        if not ready:
            return None
        batch_first = self._turns.batch_first(
            interactive_waits=any(queue.waits(batch=False) for queue in ready),
            batch_waits=any(queue.waits(batch=True) for queue in ready),
        )
        for queue in sorted(ready, key=lambda queue: _rank(queue, batch_first)):
            batch, expired = queue.pop(now, batch_first=batch_first)
            self._drop(queue, expired)
            if batch:
                return queue, batch
            # All its images were dropped in the meantime: the next queue takes its turn.
        return None

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call what touches futures and backlogs on the event loop."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _drop(self, queue: Queue, expired: list[_Entry]) -> None:
        if expired:
            self._on_loop(_reject, queue, expired)


def _reject(queue: Queue, expired: list[_Entry]) -> None:
    for entry in expired:
        queue.settle(entry, entry.state.error("while the image waited for the engine"))


def _run_job(job: Callable[[], Any], done: "Future[Any]") -> None:
    try:
        done.set_result(job())
    except BaseException as error:  # noqa: BLE001 (it is raised in the caller)
        done.set_exception(error)
