"""Forms batches: which images are computed next, with how many threads."""

from collections.abc import Callable, Sequence

from service.scheduling.cost import Load
from service.scheduling.lanes import Running
from service.scheduling.queue import Entry, Queue
from service.scheduling.turns import Turns


class BatchFormer:
    """Takes batches out of queues. Not thread-safe: the lock that guards the queues guards it."""

    def __init__(self, load: Load, *, batch_share: float, drop: Callable[[list[Entry]], None]) -> None:
        """`drop` gets images that nobody waits for, or that are too late."""
        self._load, self._turns, self._drop = load, Turns(batch_share), drop

    def next(self, queues: Sequence[Queue], free: int) -> Running | None:
        """The most urgent images, all of one model; None if there is nothing to do now, or too few cores are free."""
        now = self._load.clock()
        for queue in queues:
            self._drop_if_any(queue.drop_expired(now))
        ready = [queue for queue in queues if len(queue) and not queue.holds(now, self._load)]
        if not ready:
            return None
        interactive, batch_work = (any(queue.waits(batch=kind) for queue in ready) for kind in (False, True))
        # A turn that is due stays so until a batch is formed: images that need more cores than are free wait for them.
        batch_first = self._turns.due(interactive_waits=interactive, batch_waits=batch_work)
        # Images that will be decoded soon need cores too, as if they were already waiting.
        coming = sum(queue.backlog.in_decoding for queue in queues)
        waiting, decoding = sum(len(queue) for queue in ready) + coming, min(coming, self._load.decode_threads)
        for queue in sorted(ready, key=lambda queue: queue.rank(batch_first=batch_first)):
            plan = queue.cost.plan(len(queue), free=free, elsewhere=waiting - len(queue), decoding=decoding)
            if plan is None:
                return None
            batch, expired = queue.pop(plan.images, now, batch_first=batch_first)
            self._drop_if_any(expired)
            if batch:
                self._turns.take(batch_first=batch_first, both_wait=interactive and batch_work)
                return self._run(queue, batch, plan.threads, now)
            # All its images were dropped in the meantime: the next queue takes its turn.
        return None

    def _run(self, queue: Queue, batch: list[Entry], threads: int, now: float) -> Running:
        cost = queue.cost
        seconds = cost.seconds(cost.padded(len(batch), threads), threads)
        return Running(
            what=f"a batch of {len(batch)} of {queue.title}, predicted to take {seconds:.3g} s",
            started=now,
            predicted=seconds,
            cores=threads,
            device_seconds=min(seconds, cost.total(len(batch))),
            queue=queue,
            entries=batch,
        )

    def _drop_if_any(self, expired: list[Entry]) -> None:
        if expired:
            self._drop(expired)
