"""Engines' memory after an unusually large run: an arena keeps what it once needed, until it is trimmed.

The inputs of a model have a fixed size, and its batches were all run at warm-up. But a graph may allocate by the
content of an image, and then one image makes the arena grow by gigabytes. ONNX Runtime can free what an arena holds
beyond the needs of one run (`memory.enable_memory_arena_shrinkage`); it says nothing about an arena's size, so the
resident memory of the process, read once a second, tells when that is worth a run.
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
        """`slack_bytes`: growth since the least that the process had after the last trim; 0: never trim. `transient`:
        upper bound of what bodies and decoders take now, which no arena holds."""
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
        """Watch no more."""
        if self._task:
            self._task.cancel()

    async def check(self) -> bool:
        """Trim if memory has grown by more than the slack. Whether it did so."""
        transient, before = self._transient(), self._resident()
        # With what is transient in it: the bound may be too high, and would make a later growth of nothing.
        self._least = min(self._least, before)
        # A trim leaves what one lane needs; what the others need comes back with them, which is no growth.
        known = sum(model.arena_bytes * (1 - 1 / model.queue.cost.lanes) for model in self._registry.ready)
        if before - transient - self._least <= self._slack_bytes + known:
            return False
        for model in self._registry.ready:
            if model.engines.device == "cpu":
                # It stays open until it is trimmed.
                with model:
                    await asyncio.to_thread(self._scheduler.on_engine, model.trim)
        # What is left is no arena's: only more than that is worth another trim.
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
                # Without the watch memory would grow unnoticed for ever.
                log.exception("arenas could not be trimmed")
