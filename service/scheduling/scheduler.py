"""Dynamic batching: what is waiting when the engine is free becomes the next batch.

A queue a model and one thread for all engines, so that two models never fight for the same cores. The thread takes its
batches by itself, so a free engine does not wait for the event loop's next turn. There is no timer and no polling: a
lone image starts at once, and batches form by themselves while the engine is busy. The order is priority, then
deadline, then arrival. Who has hung up or is past its deadline is dropped before a batch is formed.

One thing keeps a free engine waiting: images that wait for a decoder. Then every core is busy, a batch of one would
take a decoder's core at the highest price an image, and the next image is a decoding away. See `Queue.holds`.
"""

import asyncio
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from service.errors import ClientDisconnected, DeadlineExceeded
from service.scheduling.cost import Cost, Load
from service.scheduling.request import Backlog, Key, RequestState

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]
Outputs = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
RunBatch = Callable[[Pixels], Outputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One image's answer and where its time went."""

    logits: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]
    queue_ms: float
    inference_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What an observer is told of a batch that was run."""

    queue: "Queue"
    images: int
    size: int
    """Rows of the engine: `images` and padding."""
    seconds: float
    failed: bool = False


@dataclass(slots=True, kw_only=True)
class _Entry:
    ticket: RequestState
    pixels: Pixels
    answer: asyncio.Future[Output]
    since: float


class Queue:
    """Images of one model that wait for the engine."""

    def __init__(self, name: str, run: RunBatch, cost: Cost) -> None:
        """`run` will be called on the engine's thread only."""
        self.name = name
        self.run = run
        self.cost = cost
        self.running: tuple[float, float] | None = None
        """Start of the batch in flight, on `time.perf_counter`'s clock, and its predicted seconds."""
        self.backlog = Backlog()
        self.coming = {False: 0, True: 0}
        """Images in the decode pool, by whether they are batch work."""
        self._heap: list[tuple[Key, int, _Entry]] = []
        self._numbers = itertools.count()
        self._buffers: dict[int, Pixels] = {}

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def head(self) -> Key:
        """Of the entry that is next. There must be one."""
        return self._heap[0][0]

    def holds(self, now: float, load: Load) -> bool:
        """Whether the next batch should wait for images that are about to be decoded.

        Only while the decoders have more than they can work on at once, there is room in the batch, and the deadline of
        the most urgent image allows for a full batch of decodings and for two of inference.
        """
        limit, head = self.cost.limit, self.head
        coming = self.coming[False] + (self.coming[True] if head.batch else 0)
        if coming <= load.decode_threads or len(self._heap) >= limit:
            return False
        return head.deadline - now > limit * load.decode_seconds + 2 * self.cost.seconds(limit)

    def push(self, entry: _Entry) -> None:
        """Put an image in its place."""
        heapq.heappush(self._heap, (entry.ticket.key, next(self._numbers), entry))

    def drop_expired(self, now: float) -> list[_Entry]:
        """Take out all entries that nobody waits for or that are too late, wherever they stand."""
        dead = [entry for _, _, entry in self._heap if _is_dead(entry, now)]
        if dead:
            gone = {id(entry) for entry in dead}
            self._heap = [place for place in self._heap if id(place[2]) not in gone]
            heapq.heapify(self._heap)
        return dead

    def pop(self, now: float) -> tuple[list[_Entry], list[_Entry]]:
        """The images of the next batch, the most urgent first, and the dead ones found on the way."""
        alive: list[_Entry] = []
        dead: list[_Entry] = []
        while self._heap and len(alive) < self.cost.limit:
            entry = heapq.heappop(self._heap)[2]
            (dead if _is_dead(entry, now) else alive).append(entry)
        if alive and not self._heap:
            taken = self.cost.take(len(alive))
            for entry in alive[taken:]:
                self.push(entry)
            alive = alive[:taken]
        return alive, dead

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

    def abandon(self) -> list[_Entry]:
        """Take out everything that waits."""
        entries = [entry for _, _, entry in self._heap]
        self._heap.clear()
        return entries


def _is_dead(entry: _Entry, now: float) -> bool:
    return entry.answer.done() or entry.ticket.gone or now > entry.ticket.deadline


class Scheduler:
    """Start with `start`, stop with `close`; both on the event loop that calls `submit`."""

    def __init__(self, load: Load) -> None:
        """`load`: of the machine that decoders and engines share."""
        self.queues: list[Queue] = []
        self._load = load
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_batch: Callable[[Batch], None] = lambda _: None
        # Guards the queues' heaps and the jobs; the engine's thread sleeps on it.
        self._change = threading.Condition()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def start(self, on_batch: Callable[[Batch], None] | None = None) -> None:
        """Begin to take batches; `on_batch` is told of each."""
        self._on_batch = on_batch or self._on_batch
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Stop after the batch in flight. Images still waiting are cancelled."""
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
        """Forget a queue that nobody will submit to any more. What still waits in it is cancelled."""
        self.queues = [other for other in self.queues if other is not queue]
        with self._change:
            abandoned = queue.abandon()
        for entry in abandoned:
            entry.answer.cancel()

    def wake(self) -> None:
        """Something has changed that may have kept a batch waiting."""
        with self._change:
            self._change.notify()

    def on_engine(self, work: Callable[[], T]) -> T:
        """Do `work` on the engine's thread, between batches, and wait for it. Not for the event loop's thread."""
        done: Future[T] = Future()
        with self._change:
            if self._closing:
                raise RuntimeError("the engine's thread has ended")
            self._jobs.append((work, done))
            self._change.notify()
        return done.result()

    @property
    def waiting(self) -> int:
        """Images in all queues."""
        return sum(len(queue) for queue in self.queues)

    async def submit(self, queue: Queue, pixels: Pixels, ticket: RequestState) -> Output:
        """Answer one image. Raises DeadlineExceeded, ClientDisconnected, or what the engine raised for its batch.

        A cancelled caller takes its own image out of the queue and no other.
        """
        entry = _Entry(
            ticket=ticket,
            pixels=pixels,
            answer=asyncio.get_running_loop().create_future(),
            since=time.perf_counter(),
        )
        with self._change:
            queue.push(entry)
            self._change.notify()
        return await entry.answer

    def _work(self) -> None:
        """The life of the engine's thread."""
        while True:
            with self._change:
                while not (self._jobs or self._closing or (found := self._next_batch())):
                    self._change.wait()
                if self._jobs:
                    job, done = self._jobs.popleft()
                elif self._closing:
                    return
                else:
                    job = None
            if job is not None:
                _run_job(job, done)
            elif found:
                self._run_batch(*found)

    def _run_batch(self, queue: Queue, batch: list[_Entry]) -> None:
        size = queue.cost.padded(len(batch))
        started = time.perf_counter()
        queue.running = started, queue.cost.seconds(size)
        try:
            outputs = queue.run(queue.fill(batch))
        except Exception as error:  # noqa: BLE001 (whatever it is, it belongs to the callers, and the thread goes on)
            queue.running = None
            self._tell(self._fail, queue, batch, size, error)
        else:
            seconds = time.perf_counter() - started
            queue.running = None
            self._tell(self._deliver, queue, batch, size, started, seconds, outputs)

    def _next_batch(self) -> tuple[Queue, list[_Entry]] | None:
        """The most urgent images, all of one model; None if there is nothing to do now."""
        if self._loop is None:
            return None
        now = time.perf_counter()
        dead = [entry for queue in self.queues for entry in queue.drop_expired(now)]
        ready = [queue for queue in self.queues if len(queue) and not queue.holds(now, self._load)]
        found: tuple[Queue, list[_Entry]] | None = None
        for queue in sorted(ready, key=lambda queue: queue.head):
            batch, others = queue.pop(now)
            dead += others
            if batch:
                found = queue, batch
                break
            # Its images have died since they were looked at: it is the next queue's turn.
        if dead:
            self._tell(_drop, dead)
        return found

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the event loop do what touches futures."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _fail(self, queue: Queue, batch: list[_Entry], size: int, error: Exception) -> None:
        self._on_batch(Batch(queue=queue, images=len(batch), size=size, seconds=0.0, failed=True))
        for entry in batch:
            entry.ticket.answered()
            if not entry.answer.done():
                entry.answer.set_exception(error)

    def _deliver(
        self, queue: Queue, batch: list[_Entry], size: int, started: float, seconds: float, outputs: Outputs
    ) -> None:
        logits, probabilities = outputs
        queue.cost.observe(size, seconds)
        self._on_batch(Batch(queue=queue, images=len(batch), size=size, seconds=seconds))
        for row, entry in enumerate(batch):
            entry.ticket.answered()
            if not entry.answer.done():
                entry.answer.set_result(
                    Output(
                        logits=logits[row],
                        probabilities=probabilities[row],
                        queue_ms=(started - entry.since) * 1000,
                        inference_ms=seconds * 1000,
                    )
                )


def _drop(dead: list[_Entry]) -> None:
    for entry in dead:
        entry.ticket.answered()
        if entry.answer.done():
            continue
        if entry.ticket.gone:
            entry.answer.set_exception(ClientDisconnected("the client hung up"))
        else:
            entry.answer.set_exception(
                DeadlineExceeded("the deadline passed while the image waited for the engine: nothing was computed")
            )


def _run_job(job: Callable[[], Any], done: "Future[Any]") -> None:
    try:
        done.set_result(job())
    except BaseException as error:  # noqa: BLE001 (it is raised where the job was asked for)
        done.set_exception(error)
