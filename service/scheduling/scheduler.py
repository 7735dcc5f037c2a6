"""Dynamic batching: the images waiting when the engine becomes free are the next batch.

There is one queue per model, and one thread for all engines, so that two models never compete for the same cores. The
thread takes its batches itself: a free engine does not wait for the event loop's next turn. There is no timer and no
polling: a single image starts at once, and batches form while the engine is busy. The order is priority, then deadline,
then arrival; batch work keeps a share of the turns. Requests whose client has left or whose deadline has passed are
dropped before a batch is formed.

A free engine waits for one thing only: images that wait for a decoder. Then every core is busy, a batch of one would
take a decoder's core at the highest cost per image, and the next image is about to be decoded. See `Queue.holds`.

A batch that fails is taken apart: its images are run again, each alone, and only those that fail again are at fault.
Whatever the engine does, each caller of `submit` gets one outcome: of its own image, its deadline, or the watchdog.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import structlog

from service.errors import NotReady
from service.scheduling.cost import Load
from service.scheduling.outputs import (
    Output,
    Outputs,
    Pixels,
    RunBatch,
    finite_rows,
    not_finite,
    raisable,
    require_shape,
)
from service.scheduling.queue import Batch, Entry, Queue
from service.scheduling.request import RequestState
from service.scheduling.turns import BATCH_SHARE, Turns
from service.scheduling.watchdog import Patience, Run, Watchdog, end_process

__all__ = ["Batch", "Output", "Outputs", "Pixels", "Queue", "RunBatch", "Scheduler"]

T = TypeVar("T")
log = structlog.get_logger()

_JOIN_SECONDS = 5.0
"""How long `close` waits for the engine. By then all requests are answered: what still runs is for nobody."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Run(Run):
    """What the engine thread is doing, and who waits for it."""

    entries: Sequence[Entry] = ()
    job: "Future[Any] | None" = None


@dataclass(slots=True, eq=False)
class _Job:
    work: Callable[[], Any]
    done: "Future[Any]" = field(default_factory=Future)


class Scheduler:
    """Start with `start`, stop with `close`; both on the event loop that calls `submit`."""

    def __init__(
        self,
        load: Load,
        *,
        batch_share: float = BATCH_SHARE,
        patience: Patience | None = None,
        leave: Callable[[str], None] = end_process,
    ) -> None:
        """`load`: that of the machine which decoders and engines share.

        `patience` says when the engine counts as hung. If it does not come back, `leave` is called with the reason.
        """
        self._turns = Turns(batch_share)
        self.queues: list[Queue] = []
        self.abandoned = False
        """Whether `close` gave up waiting for the engine, whose thread still runs."""
        self._load, self._clock = load, load.clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_batch: Callable[[Batch], None] = lambda _: None
        # Guards the queues' heaps and the jobs; the engine thread sleeps on it.
        self._change = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._closing = False
        self._run: _Run | None = None
        """What the engine thread is doing; set by that thread alone."""
        self._watchdog = Watchdog(
            patience or Patience(), self._clock, current=lambda: self._run, on_hang=self._give_up, leave=leave
        )
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def hang(self) -> str | None:
        """Why the engine counts as hung, so that nothing can be computed; None if it does not."""
        return self._watchdog.hang

    def require_engine(self) -> None:
        """Raise NotReady while the engine hangs."""
        if reason := self._watchdog.hang:
            raise NotReady(f"{reason}: nothing is computed until it comes back or is started again: retry")

    @property
    def overdue_seconds(self) -> float:
        """By how long what the engine is running has exceeded its predicted duration."""
        run = self._run
        return max(0.0, self._clock() - run.started - run.predicted) if run and run.predicted is not None else 0.0

    def start(self, on_batch: Callable[[Batch], None] | None = None) -> None:
        """Begin to run batches; `on_batch` is called with each."""
        self._on_batch = on_batch or self._on_batch
        self._loop = asyncio.get_running_loop()
        self._watchdog.start()

    async def close(self, *, timeout_seconds: float = _JOIN_SECONDS) -> None:
        """Stop after the running batch, or without it if it takes too long. Images still waiting are cancelled."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._watchdog.stop()
        await asyncio.to_thread(self._thread.join, timeout_seconds)
        self.abandoned = self._thread.is_alive()
        if self.abandoned:
            self._give_up("the service has ended, and the engine has not")
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
            abandoned = queue.clear()
        for entry in abandoned:
            entry.answer.cancel()

    def wake(self) -> None:
        """Check again whether a batch can start: an image has left the decode pool."""
        with self._change:
            self._change.notify()

    def on_engine(self, work: Callable[[], T]) -> T:
        """Call `work` on the engine thread, between batches, and wait for its result. Not from the event loop.

        Raises NotReady if the engine hangs, or if `work` does.
        """
        self.require_engine()
        job = _Job(work)
        with self._change:
            if self._closing:
                raise RuntimeError("the engine thread has ended")
            self._jobs.append(job)
            self._change.notify()
        result: T = job.done.result()
        return result

    async def submit(self, queue: Queue, pixels: Pixels, state: RequestState) -> Output:
        """The outputs for one image.

        Raises DeadlineExceeded or ClientDisconnected as soon as the request is over, NotReady if the engine hangs,
        ModelFault for outputs that are none, or the engine's error for this image.
        A cancelled caller takes its own image out of the queue and no other.
        """
        entry = Entry(
            state=state, pixels=pixels, answer=asyncio.get_running_loop().create_future(), since=self._clock()
        )
        try:
            self.require_engine()
            with self._change:
                queue.push(entry)
                self._change.notify()
            return await state.wait(entry.answer)
        finally:
            # However it ends, the engine has nothing more to do for this image.
            queue.backlog.answered(state)
            if entry.queued:
                with self._change:
                    queue.discard(entry)

    def _work(self) -> None:
        """The main loop of the engine thread."""
        try:
            while True:
                with self._change:
                    while not (self._jobs or self._closing or (found := self._next_batch())):
                        self._change.wait()
                    job = self._jobs.popleft() if self._jobs else None
                    if job is None and self._closing:
                        return
                if job is not None:
                    self._run_job(job)
                elif found:
                    self._run_batch(*found)
        except BaseException:
            # For the watchdog this is an engine that does not come back.
            self._run = _Run(what="nothing, because its thread has failed", started=self._clock(), predicted=0.0)
            log.exception("the engine thread has failed")

    def _run_job(self, job: _Job) -> None:
        self._run = _Run(
            what="a job: loading a model, or its proof", started=self._clock(), predicted=None, job=job.done
        )
        # The watchdog may have given the waiting thread its answer by then.
        with contextlib.suppress(InvalidStateError):
            try:
                job.done.set_result(job.work())
            except InvalidStateError:
                raise
            except BaseException as error:  # noqa: BLE001 (it is raised in the caller)
                job.done.set_exception(error)
        self._run = None

    def _run_batch(self, queue: Queue, batch: list[Entry]) -> None:
        size = queue.cost.padded(len(batch))
        started, predicted = self._clock(), queue.cost.seconds(size)
        queue.running = started, predicted
        self._run = _Run(
            what=f"a batch of {len(batch)} of {queue.title}, predicted to take {predicted:.3g} s",
            started=started,
            predicted=predicted,
            entries=batch,
        )
        failure: Exception | None = None
        try:
            outputs = require_shape(queue.run(queue.fill(batch)), model=queue.title, rows=size, classes=queue.classes)
            finite = finite_rows(outputs)
        except BaseException as error:  # noqa: BLE001 (it is raised in the callers, and the thread goes on)
            failure = raisable(error)
        seconds = self._clock() - started
        report = Batch(queue=queue, images=len(batch), size=size, seconds=seconds, hung=self.hang is not None)
        queue.running = self._run = None

        if failure and len(batch) > 1:
            self._run_again(queue, batch)
            self._on_loop(self._report, replace(report, retried=failure))
            return
        results: list[Output | Exception] = []
        for row, entry in enumerate(batch):
            if failure:
                results.append(failure)
            elif finite is not None and not finite[row]:
                results.append(not_finite(queue.title))
            else:
                results.append(
                    Output(
                        logits=outputs[0][row],
                        probabilities=outputs[1][row],
                        queue_ms=(started - entry.since) * 1000,
                        inference_ms=seconds * 1000,
                    )
                )
        self._on_loop(self._deliver, batch, results, report)

    def _run_again(self, queue: Queue, batch: list[Entry]) -> None:
        """Put the images of a batch that failed back into their queue, to be run each alone."""
        with self._change:
            for entry in batch:
                entry.alone = True
                if not entry.answer.done():
                    queue.push(entry)

    def _deliver(self, batch: list[Entry], results: list[Output | Exception], report: Batch) -> None:
        # The callers first: whatever happens in accounting concerns none of them.
        for entry, result in zip(batch, results, strict=True):
            entry.settle(result)
        if faults := [result for result in results if isinstance(result, Exception)]:
            report = replace(report, faults=faults)
        self._report(report)

    def _report(self, report: Batch) -> None:
        try:
            if not report.failed and not report.hung:
                report.queue.cost.observe(report.size, report.seconds)
            self._on_batch(report)
        except Exception:
            log.exception("a batch could not be accounted for", model=report.queue.name)

    def _next_batch(self) -> tuple[Queue, list[Entry]] | None:
        """The most urgent images, all of one model; None if there is nothing to do now."""
        if self._loop is None:
            return None
        now = self._clock()
        for queue in self.queues:
            self._drop(queue.drop_expired(now))
        ready = [queue for queue in self.queues if len(queue) and not queue.holds(now, self._load)]
        if not ready:
            return None
        batch_first = self._turns.batch_first(
            interactive_waits=any(queue.waits(batch=False) for queue in ready),
            batch_waits=any(queue.waits(batch=True) for queue in ready),
        )
        for queue in sorted(ready, key=lambda queue: queue.rank(batch_first=batch_first)):
            batch, expired = queue.pop(now, batch_first=batch_first)
            self._drop(expired)
            if batch:
                return queue, batch
            # All its images were dropped in the meantime: the next queue takes its turn.
        return None

    def _drop(self, expired: list[Entry]) -> None:
        if expired:
            self._on_loop(_reject, expired)

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call what touches futures on the event loop."""
        # A closed loop has nobody left who waits.
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function, *arguments)

    def _give_up(self, reason: str) -> None:
        """Give all who wait for the engine NotReady: images waiting and running, and jobs. On the event loop."""
        run = self._run
        with self._change:
            entries = [entry for queue in self.queues for entry in queue.clear()]
            jobs = [job.done for job in self._jobs]
            self._jobs.clear()
        if run is not None:
            entries += run.entries
            jobs += [run.job] if run.job else []
        for entry in entries:
            entry.settle(NotReady(f"{reason}: nothing was computed for this request, retry"))
        for job in jobs:
            with contextlib.suppress(InvalidStateError):
                job.set_exception(NotReady(reason))


def _reject(expired: list[Entry]) -> None:
    for entry in expired:
        entry.settle(entry.state.error("while the image waited for the engine"))
