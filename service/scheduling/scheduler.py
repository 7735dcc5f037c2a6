"""Dynamic batching: the images waiting when the engine has free cores are the next batches.

There is one queue per model, and the engine has lanes, which are threads that take batches from all queues. Each batch
takes one core for each thread that computes it, and no more cores are taken than there are, so two models never compete
for the same cores. The model's layouts decide how many threads that is (`service.scheduling.layouts`): one on each core
for a single image, few for each of many. The lanes take their batches themselves: a free one does not wait for the
event loop's next turn. There is no timer and no polling: a single image starts at once, and batches form while the
engine is busy. Decoders give their images to the queues directly, and a lone image is computed by the thread that
decoded it: on an idle machine, each thread switch costs a wake-up. The order is priority, then deadline, then arrival;
batch work keeps a share of the turns. If the most urgent images need more cores than are free, nothing overtakes them
while they wait. Requests whose client has left or whose deadline has passed are dropped before a batch is formed.

A free engine waits for one thing only: images that wait for a decoder. Then every core is busy, a batch of one would
take a core from a decoder at the highest cost per image, and the next image is about to be decoded. See `Queue.holds`.

A batch that fails is taken apart: its images are run again, each alone, and only those that fail again are at fault.
Whatever the engine does, each caller of `outcome` gets one: from its own image, its deadline, or the watchdog.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from service.errors import NotReady
from service.scheduling.cost import Load
from service.scheduling.former import BatchFormer
from service.scheduling.lanes import Lanes, Running
from service.scheduling.loop_calls import call_on_loop
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
from service.scheduling.spare import Spare
from service.scheduling.turns import BATCH_SHARE
from service.scheduling.watchdog import Patience, Watchdog, end_process

__all__ = ["Batch", "Output", "Outputs", "Pixels", "Queue", "RunBatch", "Scheduler"]

T = TypeVar("T")
log = structlog.get_logger()

_JOIN_SECONDS = 5.0
"""How long `close` waits for the engine. By then all requests are answered: nobody waits for what still runs."""


class Scheduler:
    """Start with `start`, stop with `close`; both on the event loop that calls `submit`."""

    def __init__(
        self,
        load: Load,
        *,
        cores: int = 1,
        batch_share: float = BATCH_SHARE,
        patience: Patience | None = None,
        leave: Callable[[str], None] = end_process,
    ) -> None:
        """`load`: that of the machine that decoders and engines share; `cores`: those for the engines.

        `patience` says when the engine counts as hung. If it does not come back, `leave` is called with the reason.
        """
        self._former = BatchFormer(load, batch_share=batch_share, drop=self._drop)
        self.queues: list[Queue] = []
        self._expected: set[Entry] = set()
        """Images that are not decoded yet."""
        self.abandoned = False
        """Whether `close` gave up waiting for the engine, which still has a running lane."""
        self._clock = load.clock
        self.spare: Spare | None = None
        """What may be computed while there is nothing else to do, if there is such work."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_batch: Callable[[Batch], None] = lambda _: None
        self.lanes = Lanes(
            cores,
            self._clock,
            find=self._next_batch,
            run_batch=self._run_batch,
            busy=load.arrivals.busy,
            failed=lambda run, error: self._on_loop(_fail, run.entries, error),
        )
        self._change = self.lanes.change
        """Guards the queues' heaps too."""
        self._watchdog = Watchdog(
            patience or Patience(), self._clock, current=lambda: self.lanes.runs, on_hang=self._give_up, leave=leave
        )

    @property
    def hang(self) -> str | None:
        """Why the engine counts as hung, so that nothing can be computed; None if it does not."""
        return self._watchdog.hang

    def require_engine(self) -> None:
        """Raise NotReady while the engine hangs."""
        if reason := self._not_ready():
            raise NotReady(reason)

    def _not_ready(self) -> str | None:
        reason = self._watchdog.hang
        return reason and f"{reason}: nothing is computed until it comes back or is started again: retry"

    @property
    def overdue_seconds(self) -> float:
        """By how long what the engine is running has exceeded its predicted duration."""
        now = self._clock()
        predicted = [run.started + run.predicted for run in self.lanes.runs if run.predicted is not None]
        return max(0.0, now - min(predicted, default=now))

    def start(self, on_batch: Callable[[Batch], None] | None = None) -> None:
        """Begin to run batches; `on_batch` is called with each."""
        self._on_batch = on_batch or self._on_batch
        self._loop = asyncio.get_running_loop()
        self._watchdog.start()

    async def close(self, *, timeout_seconds: float = _JOIN_SECONDS) -> None:
        """Stop after the running batches, or without them if they take too long. Images still waiting are cancelled."""
        self.lanes.close()
        self._watchdog.stop()
        self.abandoned = not await asyncio.to_thread(self.lanes.join, timeout_seconds)
        if self.abandoned:
            self._give_up("the service has ended, and the engine has not")
        with self._change:
            jobs = self.lanes.take_jobs()
        for job in jobs:
            job.fail(NotReady("the service has ended"))
        for queue in self.queues:
            self.remove(queue)
        self._clear_spare()

    def add(self, queue: Queue) -> Queue:
        """Serve one more queue."""
        self.lanes.add(queue.cost.lanes)
        self.queues = [*self.queues, queue]
        return queue

    def remove(self, queue: Queue) -> None:
        """Stop serving a queue to which nothing will be submitted any more. Images still waiting are cancelled."""
        self.queues = [other for other in self.queues if other is not queue]
        with self._change:
            abandoned = queue.clear()
            if self.spare:
                self.spare.clear("unloaded", queue=queue)
            self._change.notify()
        for entry in abandoned:
            entry.answer.cancel()

    def look_for_spare(self) -> None:
        """Have a lane look for spare work: nothing else tells it that the last answer is written. On the event loop."""
        with self._change:
            self._change.notify()

    def on_engine(self, work: Callable[[], T], *, cores: int | None = None) -> T:
        """Call `work` on one of the engine's lanes, on `cores` cores (None: all), and wait for its result.

        It goes before all batches; with 0 cores it goes beside them, at low priority. Not from the event loop. Raises
        NotReady if the engine hangs, or if `work` does.
        """
        self.require_engine()
        result: T = self.lanes.submit(work, self.lanes.cores if cores is None else cores).result()
        return result

    def entry(self, state: RequestState) -> Entry:
        """An entry for an image of the request; `outcome` awaits its outcome. On the event loop."""
        return Entry(state=state, answer=asyncio.get_running_loop().create_future())

    def expect(self, queue: Queue, entry: Entry, *, soon: bool = True) -> None:
        """Expect an image that is about to be decoded, until it is offered or has its outcome.

        `soon`: batches take its arrival into account.
        """
        with self._change:
            self._expected.add(entry)
            entry.soon = soon
            queue.backlog.decoding[entry.state.key.batch] += soon

    def postpone(self, queue: Queue, entry: Entry) -> None:
        """An image that was expected soon takes longer: batches need not wait for it."""
        with self._change:
            if entry in self._expected and entry.soon:
                entry.soon = False
                queue.backlog.decoding[entry.state.key.batch] -= 1
                self._change.notify()

    def offer(self, queue: Queue, entry: Entry, pixels: Pixels, *, here: bool = False) -> None:
        """Have an image computed; from any thread.

        `here`: a lone image may be computed by the calling thread, before this returns: that saves two thread
        switches.
        """
        if reason := self._not_ready():
            self._on_loop(entry.settle, NotReady(reason))
            return
        run: Running | None = None
        with self._change:
            self._no_longer_expect(queue, entry)
            if entry.answer.done():
                # Others may have been held for it.
                self._change.notify()
                return
            entry.pixels, entry.since = pixels, self._clock()
            queue.push(entry)
            if here and queue.any_thread and self._is_alone():
                run = self.lanes.begin_here()
            if run is None:
                self._change.notify()
        if run is not None:
            self.lanes.run_here(run)

    async def outcome(self, queue: Queue, entry: Entry) -> Output:
        """The outputs for an image that was offered, or will be.

        Raises DeadlineExceeded or ClientDisconnected as soon as the request is over, NotReady if the engine hangs,
        ModelFault for invalid outputs, or the decoder's or the engine's error for this image.
        A cancelled caller takes its own image out of the queue and no other.
        """
        try:
            # If a hang was noticed before this image was expected, its caller has not been told.
            self.require_engine()
            return await entry.state.wait(entry.answer)
        finally:
            # However it ends, the engine has nothing more to do for this image.
            queue.backlog.answered(entry.state)
            self.forget(queue, entry)
            # Its error refers to this frame through the traceback: the cycle would keep the image alive.
            del entry

    def forget(self, queue: Queue, entry: Entry) -> None:
        """Stop all work for an image, whether it is expected, waiting, or neither. On the event loop."""
        # A thread that is decoding it must not offer it any longer.
        entry.answer.cancel()
        if entry.queued or entry in self._expected:
            with self._change:
                self._no_longer_expect(queue, entry)
                queue.discard(entry)
                # It may have kept others waiting, for its decoding or for more cores than they need.
                self._change.notify()

    async def submit(self, queue: Queue, pixels: Pixels, state: RequestState) -> Output:
        """The outputs for one image. Raises as `outcome`."""
        entry = self.entry(state)
        self.offer(queue, entry, pixels)
        return await self.outcome(queue, entry)

    def _no_longer_expect(self, queue: Queue, entry: Entry) -> None:
        if entry in self._expected:
            self._expected.remove(entry)
            queue.backlog.decoding[entry.state.key.batch] -= entry.soon

    def _is_alone(self) -> bool:
        """Whether a single image waits, and none is about to be decoded."""
        return sum(len(queue) + queue.backlog.in_decoding for queue in self.queues) == 1

    def _run_batch(self, run: Running, queue: Queue, lane: int) -> None:
        batch, threads = run.entries, run.cores
        size = queue.cost.padded(len(batch), threads)
        failure: Exception | None = None
        try:
            pixels = queue.fill(batch, size, lane)
            outputs = require_shape(queue.run(pixels, threads), model=queue.title, rows=size, classes=queue.classes)
            finite = finite_rows(outputs)
        except BaseException as error:  # noqa: BLE001 (it is raised in the callers, and the lane goes on)
            failure = raisable(error)
        seconds = self._clock() - run.started
        hung = self.hang is not None
        report = Batch(queue=queue, images=len(batch), size=size, seconds=seconds, threads=threads, hung=hung)

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
                        queue_ms=(run.started - entry.since) * 1000,
                        inference_ms=seconds * 1000,
                        threads=threads,
                    )
                )
        self._on_loop(self._deliver, batch, results, report)

    def _run_again(self, queue: Queue, batch: Sequence[Entry]) -> None:
        """Put the images of a batch that failed back into their queue, to be run each alone."""
        with self._change:
            for entry in batch:
                entry.alone = True
                if not entry.answer.done():
                    queue.push(entry)

    def _deliver(self, batch: Sequence[Entry], results: list[Output | Exception], report: Batch) -> None:
        # The callers first: whatever happens in accounting must not affect them.
        for entry, result in zip(batch, results, strict=True):
            entry.settle(result)
        if faults := [result for result in results if isinstance(result, Exception)]:
            report = replace(report, faults=faults)
        self._report(report)

    def _report(self, report: Batch) -> None:
        try:
            if not report.failed and not report.hung:
                report.queue.cost.observe(report.size, report.seconds, report.threads)
            self._on_batch(report)
        except Exception:
            log.exception("a batch could not be accounted for", model=report.queue.name)

    def _next_batch(self, free: int) -> Running | None:
        if self._loop is None:
            return None
        run = self._former.next(self.queues, free)
        if run is None and self.spare is not None and self.spare.waiting and self._is_idle(free):
            run = self.spare.take(self.queues, self._clock())
        return run

    def _is_idle(self, free: int) -> bool:
        """Whether the engine does nothing, and no accepted image is unanswered."""
        return (
            free == self.lanes.cores
            and not self._expected
            and not any(len(queue) or queue.backlog.waiting for queue in self.queues)
        )

    def _drop(self, expired: list[Entry]) -> None:
        self._on_loop(_reject, expired)

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call what touches futures on the event loop."""
        if self._loop is not None:
            call_on_loop(self._loop, function, *arguments)

    def _give_up(self, reason: str) -> None:
        """Give NotReady to all that wait for the engine: images being decoded, waiting and running, and jobs.

        On the event loop. What hangs may be on a decoder's thread, which the images being decoded would wait for.
        """
        with self._change:
            entries = [*self._expected, *(entry for queue in self.queues for entry in queue.clear())]
            jobs = self.lanes.take_jobs()
        for run in self.lanes.runs:
            entries += run.entries
            jobs += [run.job] if run.job else []
        self._clear_spare()
        for entry in entries:
            entry.settle(NotReady(f"{reason}: nothing was computed for this request, retry"))
        for job in jobs:
            job.fail(NotReady(reason))

    def _clear_spare(self) -> None:
        if self.spare:
            with self._change:
                self.spare.clear()


def _fail(entries: Sequence[Entry], error: Exception) -> None:
    for entry in entries:
        entry.settle(error)


def _reject(expired: list[Entry]) -> None:
    for entry in expired:
        entry.settle(entry.state.error("while the image waited for the engine"))
