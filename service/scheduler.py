"""Dynamic batching: what is waiting when the engine is free becomes the next batch.

One queue a model and one thread for all engines, so that two models never fight for the same cores. There is no timer
and no polling: a lone image starts at once, and batches form by themselves while the engine is busy.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
RunBatch = Callable[[Pixels], tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One image's answer and where its time went."""

    logits: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]
    queue_ms: float
    inference_ms: float


@dataclass(slots=True, kw_only=True)
class _Entry:
    pixels: Pixels
    answer: asyncio.Future[Output]
    since: float


@dataclass(slots=True, kw_only=True)
class Queue:
    """Images of one model that wait for the engine. Made by `Scheduler.add`."""

    name: str
    run: RunBatch
    max_batch: int
    waiting: deque[_Entry] = field(default_factory=deque)
    seconds_per_image: float = 0.0
    """Moving average over recent batches; 0 before the first."""


class Scheduler:
    """Start with `start`, stop with `close`; both on the event loop that calls `submit`."""

    def __init__(self) -> None:
        self._queues: list[Queue] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._on_batch: Callable[[str, int, float], None] = lambda *_: None

    def start(self, on_batch: Callable[[str, int, float], None] | None = None) -> None:
        """Begin to take batches; `on_batch(model, size, seconds)` is told of each."""
        self._on_batch = on_batch or self._on_batch
        self._task = asyncio.create_task(self._serve(), name="scheduler")

    async def close(self) -> None:
        """Stop after the batch in flight. Images still waiting are cancelled."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for queue in self._queues:
            for entry in queue.waiting:
                entry.answer.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def add(self, name: str, run: RunBatch, *, max_batch: int) -> Queue:
        """A queue for one model. `run` is called on the engine thread only."""
        queue = Queue(name=name, run=run, max_batch=max_batch)
        self._queues.append(queue)
        return queue

    @property
    def waiting(self) -> int:
        """Images in all queues."""
        return sum(len(queue.waiting) for queue in self._queues)

    def drain_seconds(self) -> float:
        """How long the images that wait now will keep the engine busy, by recent batches."""
        return sum(len(queue.waiting) * queue.seconds_per_image for queue in self._queues)

    async def submit(self, queue: Queue, pixels: Pixels) -> Output:
        """Answer one image. A cancelled caller takes its own image out of the queue and no other."""
        entry = _Entry(pixels=pixels, answer=asyncio.get_running_loop().create_future(), since=time.perf_counter())
        queue.waiting.append(entry)
        self._wake.set()
        return await entry.answer

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            batch, queue = self._next_batch()
            if queue is None:
                self._wake.clear()
                continue
            started = time.perf_counter()
            try:
                pixels = np.stack([entry.pixels for entry in batch])
                logits, probabilities = await loop.run_in_executor(self._thread, queue.run, pixels)
            except Exception as error:  # noqa: BLE001 (whatever it is, it belongs to the callers, and the loop goes on)
                for entry in batch:
                    if not entry.answer.done():
                        entry.answer.set_exception(error)
                continue
            except asyncio.CancelledError:
                for entry in batch:
                    entry.answer.cancel()
                raise
            seconds = time.perf_counter() - started
            per_image = seconds / len(batch)
            queue.seconds_per_image += (per_image - queue.seconds_per_image) * (0.1 if queue.seconds_per_image else 1.0)
            self._on_batch(queue.name, len(batch), seconds)
            for row, entry in enumerate(batch):
                if not entry.answer.done():
                    entry.answer.set_result(
                        Output(
                            logits=logits[row],
                            probabilities=probabilities[row],
                            queue_ms=(started - entry.since) * 1000,
                            inference_ms=seconds * 1000,
                        )
                    )

    def _next_batch(self) -> tuple[list[_Entry], Queue | None]:
        """The images that have waited longest, of one model, without those whose caller has left."""
        for queue in self._queues:
            while queue.waiting and queue.waiting[0].answer.done():
                queue.waiting.popleft()
        ready = [queue for queue in self._queues if queue.waiting]
        if not ready:
            return [], None
        queue = min(ready, key=lambda queue: queue.waiting[0].since)
        batch: list[_Entry] = []
        while queue.waiting and len(batch) < queue.max_batch:
            entry = queue.waiting.popleft()
            if not entry.answer.done():
                batch.append(entry)
        return batch, queue
