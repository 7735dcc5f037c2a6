"""Engines' memory after an unusually large run: an arena keeps what it once needed, until it is trimmed.

The inputs of a model have a fixed size, and its batches were all run at warm-up. But a graph may allocate by the
content of an image, and then one image makes the arena grow by gigabytes. ONNX Runtime can free what an arena holds
beyond the needs of one run (`memory.enable_memory_arena_shrinkage`); it does not report an arena's size, so the
resident memory of the process, read once a second, decides when that is worth a run.
"""

import asyncio
from collections.abc import Callable

import structlog

from service.errors import ServiceError
from service.host import resident_bytes
from service.models.registry import Registry
from service.scheduling.scheduler import Scheduler

log = structlog.get_logger()

_INTERVAL_SECONDS = 1.0


class ArenaTrimmer:
    """Trims the arenas of all models on the CPU when resident memory has grown."""

    def __init__(
        self,
        registry: Registry,
        scheduler: Scheduler,
        *,
        slack_bytes: int,
        transient: Callable[[], int] = lambda: 0,
        resident: Callable[[], int] = resident_bytes,
    ) -> None:
        """`slack_bytes`: trim after this much growth over the lowest memory since the last trim; 0: never trim.
        `transient`: upper bound of the memory that request bodies and decoders use now, outside the arenas."""
        self._registry, self._scheduler = registry, scheduler
        self._slack_bytes, self._transient, self._resident = slack_bytes, transient, resident
        self._least = resident()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watch until `stop`. On the event loop."""
        self._least = self._resident()
        if self._slack_bytes:
            self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Stop watching."""
        if self._task:
            self._task.cancel()

    async def check(self) -> bool:
        """Trim if memory has grown by more than the slack; returns whether it did."""
        transient, before = self._transient(), self._resident()
        # Including transient memory: its bound may be too high, and subtracting it would later look like growth.
        self._least = min(self._least, before)
        # A trim leaves what one lane needs; the other lanes allocate theirs again, which does not count as growth.
        known = sum(model.arena_bytes * (1 - 1 / model.queue.cost.lanes) for model in self._registry.ready)
        if before - transient - self._least <= self._slack_bytes + known:
            return False
        for model in self._registry.ready:
            if model.engines.device == "cpu":
                # Keeps the model open until it is trimmed.
                with model:
                    await asyncio.to_thread(self._scheduler.on_engine, model.trim)
        # What is left is not in the arenas: only growth beyond it is worth another trim.
        self._least = self._resident()
        log.info("arenas trimmed", resident_bytes_before=before, resident_bytes=self._least)
        return True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            try:
                await self.check()
            except ServiceError as error:  # the engine hangs, or the model fails: the next check may succeed
                log.warning("arenas could not be trimmed", reason=str(error))
            except Exception:
                # If this task ended, memory would grow unnoticed.
                log.exception("arenas could not be trimmed")
