"""The engine's lanes: threads that run batches and jobs, and the cores that they take meanwhile."""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import structlog

from service.scheduling.queue import Entry, Queue
from service.scheduling.watchdog import Run

log = structlog.get_logger()

_ELSEWHERE = -1
"""Stands for a thread that is not a lane, on which a lone batch is computed."""

_BESIDE_NICE = 10
"""Niceness added to the thread for jobs beside the lanes: it gets a tenth of a core that both want."""
_BESIDE_SLOWED = 12.0
"""How many times as long a job may take beside the lanes before it counts as hung."""


@dataclass(slots=True, eq=False, kw_only=True)
class Running(Run):
    """What a lane is doing, and who waits for it."""

    cores: int = 1
    """Taken until it ends."""
    device_seconds: float = 0.0
    """Its predicted cost to the device, of which it uses only a part while other lanes work."""
    queue: Queue | None = None
    entries: Sequence[Entry] = ()
    job: "Job | None" = None


@dataclass(slots=True, eq=False)
class Job:
    """Work for the engine that is not a batch."""

    work: Callable[[], Any]
    cores: int
    done: "Future[Any]" = field(default_factory=Future)

    def run(self) -> None:
        """Do it, and give its result or its error to the caller."""
        # The watchdog may have given the caller an answer by then.
        with contextlib.suppress(InvalidStateError):
            try:
                self.done.set_result(self.work())
            except InvalidStateError:
                raise
            except BaseException as error:  # noqa: BLE001 (it is raised in the caller)
                self.done.set_exception(error)

    def fail(self, error: Exception) -> None:
        """Give the caller an error, unless it has an answer."""
        with contextlib.suppress(InvalidStateError):
            self.done.set_exception(error)


class Lanes:
    """Threads that take what is to run next as soon as enough cores are free. Jobs go before batches."""

    def __init__(
        self,
        cores: int,
        clock: Callable[[], float],
        *,
        find: Callable[[int], Running | None],
        run_batch: Callable[[Running, Queue, int], None],
        busy: Callable[[bool], None] = lambda _: None,
        failed: Callable[[Running, Exception], None] = lambda *_: None,
    ) -> None:
        """`find` gives the next batch for a number of free cores, or None, and is called while `change` is held.

        `run_batch` runs one on the lane of that number, and must not raise. `busy` is called with whether batches run,
        `failed` with a batch on another thread if `run_batch` raises nevertheless.
        """
        self.cores, self._clock = cores, clock
        self._find, self._run_batch, self._busy, self._failed = find, run_batch, busy, failed
        lock = threading.RLock()
        self.change = threading.Condition(lock)
        """Guards whatever `find` reads, the jobs and `runs`; lanes without work sleep on it."""
        self._change_beside = threading.Condition(lock)
        """The thread beside the lanes sleeps on this one."""
        self.runs: tuple[Running, ...] = ()
        """What the lanes are doing; replaced by them, and read anywhere."""
        self._jobs: deque[Job] = deque()
        self._jobs_beside: deque[Job] = deque()
        self._lanes, self._has_beside = 0, False
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._missed = False
        """Whether a lane has found nothing to do while something ran: it may have needed the cores of that."""
        self.add(1)

    @property
    def count(self) -> int:
        """Batches that may be computed at once."""
        return self._lanes

    @property
    def free_cores(self) -> int:
        """Cores that no batch and no job takes."""
        return self.cores - sum(run.cores for run in self.runs)

    def add(self, number: int) -> None:
        """Start lanes until there are `number`, or one for each core."""
        with self.change:
            while self._lanes < min(number, self.cores):
                arguments = self._lanes, self._next
                thread = threading.Thread(target=self._work, args=arguments, name=f"engine-{self._lanes}", daemon=True)
                self._lanes += 1
                self._threads.append(thread)
                thread.start()

    def submit(self, work: Callable[[], Any], cores: int) -> "Future[Any]":
        """The result of `work`, which is called on a lane once `cores` cores are free.

        With 0 cores it is called beside the lanes, one job at a time, on a thread of low priority: no batch waits for
        it. Threads that the work itself uses keep their priority. Raises RuntimeError once the lanes have ended.
        """
        job = Job(work, min(cores, self.cores))
        with self.change:
            if self._closing:
                raise RuntimeError("the engine has ended")
            if cores:
                self._jobs.append(job)
                self.change.notify()
            else:
                self._jobs_beside.append(job)
                self._start_beside()
                self._change_beside.notify()
        return job.done

    def begin_here(self) -> Running | None:
        """Begin the next batch on the calling thread, unless something else runs or a job waits. `change` must be held.

        What is begun is for `run_here`.
        """
        run = None if self._jobs or any(run.cores for run in self.runs) else self._next_batch()
        if run is not None:
            self._set_runs((*self.runs, run))
        return run

    def run_here(self, run: Running) -> None:
        """Do what `begin_here` has begun, without holding `change`."""
        try:
            self._do(run, _ELSEWHERE)
        except Exception as error:
            # The watchdog notices a lane that fails like this; here nothing would.
            log.exception("a lone batch has failed beside its computing")
            self._failed(run, error)
        finally:
            with self.change:
                if self._missed or self._closing:
                    self._missed = False
                    self.change.notify_all()

    def take_jobs(self) -> list[Job]:
        """Take out the jobs that have not begun. `change` must be held."""
        jobs = [*self._jobs, *self._jobs_beside]
        self._jobs.clear()
        self._jobs_beside.clear()
        return jobs

    def close(self) -> None:
        """Let the lanes end after what they are running."""
        with self.change:
            self._closing = True
            self.change.notify_all()
            self._change_beside.notify_all()

    def join(self, timeout_seconds: float) -> bool:
        """Wait until all lanes and any batch on another thread have ended; returns whether they did in time. Blocks."""
        end = time.monotonic() + timeout_seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self.change:
            ended = self.change.wait_for(
                lambda: not any(run.queue is not None for run in self.runs), max(0.0, end - time.monotonic())
            )
        return ended and not any(thread.is_alive() for thread in self._threads)

    def _start_beside(self) -> None:
        if not self._has_beside:
            self._has_beside = True
            thread = threading.Thread(target=self._work_beside, name="engine-beside", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work_beside(self) -> None:
        # Linux has a priority for each thread; elsewhere the job has that of the lanes.
        with contextlib.suppress(OSError, AttributeError):
            own = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + _BESIDE_NICE)
        self._work(_ELSEWHERE, self._next_beside)

    def _work(self, lane: int, find: Callable[[], Running | None]) -> None:
        """The main loop of a lane, or of the thread beside them."""
        try:
            while run := find():
                self._do(run, lane)
                # Otherwise it would keep the images of this run alive while it waits for the next one.
                del run
        except BaseException:
            # To the watchdog, this is a lane that does not come back.
            with self.change:
                what, cores = "nothing, because a lane has failed", int(lane != _ELSEWHERE)
                self.runs += (Running(what=what, started=self._clock(), predicted=0.0, cores=cores),)
            log.exception("a lane of the engine has failed")

    def _do(self, run: Running, lane: int) -> None:
        try:
            if run.job:
                run.job.run()
            elif run.queue is not None:
                self._run_batch(run, run.queue, lane)
        finally:
            with self.change:
                self._set_runs(tuple(other for other in self.runs if other is not run))

    def _set_runs(self, runs: tuple[Running, ...]) -> None:
        self.runs = runs
        self._busy(any(run.queue is not None for run in runs))

    def _next(self) -> Running | None:
        """Wait for the next run and begin it; None if there will be none."""
        with self.change:
            while not (run := self._next_job() if self._jobs else self._next_batch()):
                if self._closing:
                    return None
                self._missed = self._missed or any(run.cores for run in self.runs)
                self.change.wait()
            self._set_runs((*self.runs, run))
            if self.free_cores:
                # There may be work for another lane.
                self.change.notify()
            return run

    def _next_beside(self) -> Running | None:
        """Wait for the next job beside the lanes and begin it; None if there will be none."""
        with self.change:
            while not self._jobs_beside and not self._closing:
                self._change_beside.wait()
            if self._closing:
                return None
            run = self._running(self._jobs_beside.popleft())
            self._set_runs((*self.runs, run))
            return run

    def _next_job(self) -> Running | None:
        # No batch begins until there are cores for the job: otherwise it would never get its turn.
        if self._jobs[0].cores > self.free_cores:
            return None
        return self._running(self._jobs.popleft())

    def _running(self, job: Job) -> Running:
        what = "a job: loading a model, or its proof"
        slowed = 1.0 if job.cores else _BESIDE_SLOWED
        return Running(what=what, started=self._clock(), predicted=None, slowed=slowed, cores=job.cores, job=job)

    def _next_batch(self) -> Running | None:
        free = self.free_cores
        return self._find(free) if free and not self._closing else None
