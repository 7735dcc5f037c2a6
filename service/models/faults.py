"""Models that fail: counted by kind, logged without flooding the log, and taken out of service if they keep failing."""

import asyncio
from collections.abc import Callable

import structlog

from service.errors import ModelFault
from service.metrics import Metrics
from service.models.machine import is_of_the_moment
from service.models.model import Model
from service.models.registry import Registry
from service.scheduling.scheduler import Batch
from service.throttle import LogThrottle

log = structlog.get_logger()


class Faults:
    """Tracks the health of models by the outcomes of their batches. On the event loop."""

    def __init__(
        self, registry: Registry, metrics: Metrics, *, max_consecutive: int, clock: Callable[[], float]
    ) -> None:
        """`max_consecutive`: images in a row without an answer, after which a model is taken out; 0: never.

        An image for which the machine lacked memory does not count: it says nothing about the model.
        """
        self._registry, self._metrics = registry, metrics
        self._max_consecutive = max_consecutive
        self._throttle = LogThrottle(clock)
        self._withdrawals: dict[Model, asyncio.Task[None]] = {}

    def record(self, batch: Batch, model: Model | None) -> None:
        """Account for a batch of `model`, which is None if it is no longer served."""
        name = batch.queue.name
        if batch.failed:
            self._metrics.batch_errors(name).inc()
        for fault in batch.faults:
            self._metrics.model_faults(name, _kind(fault)).inc()
        if error := batch.retried or next(iter(batch.faults), None):
            self._log(batch, error)
        if model is None or batch.retried:
            return
        if not batch.failed:
            model.consecutive_faults = 0
            return
        own = [fault for fault in batch.faults if not is_of_the_moment(fault)]
        if not own:
            return
        model.consecutive_faults += len(own)
        if 0 < self._max_consecutive <= model.consecutive_faults and model not in self._withdrawals:
            reason = (
                f"it failed on {model.consecutive_faults} images in a row, the last time because "
                f"{_reason(own[-1])}: load it again to try it again"
            )
            self._withdrawals[model] = asyncio.get_running_loop().create_task(self._withdraw(model, reason))

    async def _withdraw(self, model: Model, reason: str) -> None:
        try:
            await self._registry.withdraw(model, reason)
        finally:
            del self._withdrawals[model]

    def _log(self, batch: Batch, error: Exception) -> None:
        title = batch.queue.title
        if (passed_over := self._throttle.passed_over(title)) is None:
            return
        log.error(
            "model fault",
            model=title,
            kind=_kind(error),
            images=batch.images,
            run_again=batch.retried is not None,
            reason=_reason(error),
            more_not_logged=passed_over,
        )


def _kind(error: Exception) -> str:
    return error.kind if isinstance(error, ModelFault) else "exception"


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
