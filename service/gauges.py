"""The present state of the service as metrics: values that are read at each scrape, unlike counts of events."""

import math
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.pipeline import Pipeline


class Gauges(Collector):
    """The gauges of one application; `Metrics.registry` takes it as a collector."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def collect(self) -> Iterator[Metric]:
        """One family for each gauge."""
        admission, load = self._pipeline.admission, self._pipeline.load
        yield _gauge("pending_images", "Images accepted and not yet answered.", admission.images)
        yield _gauge("pending_bytes", "Bytes of the bodies of requests accepted and not yet answered.", admission.bytes)
        scheduler = self._pipeline.scheduler
        drain = "Predicted time until all accepted work is done, by the cost model; infinite while the engine hangs."
        yield _gauge("predicted_drain_seconds", drain, predicted_drain_seconds(self._pipeline))
        yield _gauge(
            "engine_hung", "1 while the engine hangs and nothing can be computed, otherwise 0.", bool(scheduler.hang)
        )
        lag = "Largest delay of the event loop in the last 15 to 30 seconds."
        yield _gauge("event_loop_lag_seconds", lag, self._pipeline.lag.worst_seconds)
        megapixel = "Predicted time to decode one megapixel of a JPEG, not counting the time to open it."
        yield _gauge("predicted_megapixel_seconds", megapixel, load.seconds_per_pixel * 1e6)
        slowdown = "Recent duration of batches divided by their duration at warm-up."
        yield _gauge("device_slowdown_ratio", slowdown, load.slowdown.value)
        registry = self._pipeline.registry
        loads = CounterMetricFamily(
            "stridevit_model_loads",
            "Attempts to load a version of a model: successful (outcome=ready) or not (outcome=failed).",
            labels=["outcome"],
        )
        for outcome in ("ready", "failed"):
            loads.add_metric([outcome], registry.loads[outcome])
        yield loads
        readable = "1 if the last scan could list the repository and every folder in it, otherwise 0."
        yield _gauge("repository_readable", readable, registry.readable)
        held = self._pipeline.rollouts.spare if self._pipeline.rollouts else None
        waiting = "Images waiting to be compared for a shadow or a canary, or being computed for it."
        yield _gauge("rollout_pending_images", waiting, held.images if held else 0)
        yield _gauge(
            "rollout_pending_bytes", "Bytes held by the images in rollout_pending_images.", held.bytes if held else 0
        )
        depth = _model_gauge("queue_depth", "Images waiting for the engine.")
        info = _model_gauge("model_info", "Models that take traffic; the value is always 1.", "variant")
        memory = _model_gauge(
            "model_memory_bytes",
            "Growth of resident memory in the proof of the model: from loading (kind=model) or warm-up (kind=arena).",
            "kind",
        )
        batch = _model_gauge(
            "predicted_batch_seconds", "Predicted duration of a batch, for each batch size in use.", "size"
        )
        for model in self._pipeline.registry.ready:
            labels, attention = [model.name, str(model.version)], model.manifest.attention
            depth.add_metric(labels, len(model.queue))
            info.add_metric([*labels, attention.variant if attention else ""], 1)
            memory.add_metric([*labels, "model"], model.model_bytes)
            memory.add_metric([*labels, "arena"], model.arena_bytes)
            for size, seconds in model.queue.cost.as_dict().items():
                batch.add_metric([*labels, str(size)], seconds)
        yield from (depth, info, memory, batch)


def predicted_drain_seconds(pipeline: Pipeline) -> float:
    """Predicted seconds until all accepted work is done; infinite while the engine hangs."""
    scheduler = pipeline.scheduler
    # A batch that takes longer than predicted may take as long again.
    return math.inf if scheduler.hang else pipeline.admission.drain_seconds() + scheduler.overdue_seconds


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"stridevit_{name}", text, value=value)


def _model_gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"stridevit_{name}", text, labels=["model", "version", *labels])
