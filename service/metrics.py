"""Prometheus metrics, in base units and with conventional names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from service.host import peak_bytes

_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGauges:
    """The present state of a model that takes traffic."""

    name: str
    version: int
    variant: str
    queue_depth: int
    """Images waiting for the engine."""
    model_bytes: int
    arena_bytes: int
    """Growth of resident memory while the model was loaded, and while it was warmed up."""
    batch_seconds: Mapping[int, float]
    """Predicted duration of a batch, by its size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """The present state of the service: what is read when metrics are scraped, and not counted as it happens."""

    pending_images: int
    pending_bytes: int
    """Images, and bytes of bodies, that are accepted and not yet answered."""
    predicted_drain_seconds: float
    slowdown: float
    models: Sequence[ModelGauges]


class Metrics:
    """All metrics of one application."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"stridevit_{name}_total", text, labels, registry=registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"stridevit_{name}_duration_seconds", text, labels, buckets=_SECONDS, registry=registry)

        self.requests = counter("requests", "HTTP requests answered.", "route", "method", "status")
        self.request_seconds = seconds(
            "request", "Time from the first byte of a request's head to the end of its answer.", "route"
        )
        self.images = counter("images", "Images answered, by outcome: ok or the error's code.", "model", "outcome")
        self.stage_seconds = seconds(
            "stage",
            "Time of one image in a stage (decode, queue, inference), or of its whole request (total).",
            "model",
            "stage",
        )
        self.batch_size = Histogram(
            "stridevit_batch_size", "Images in a batch.", ["model"], buckets=_BATCH_SIZES, registry=registry
        )
        self.rows = counter(
            "engine_rows",
            "Rows computed by the engine: images, and the padding that fills a batch up to a warmed-up size.",
            "model",
            "kind",
        )
        self.batch_errors = counter("batch_errors", "Batches that the engine could not run.", "model")
        self.rejections = counter(
            "rejections",
            "Requests refused (images, bytes, deadline) or dropped (deadline-exceeded, client-disconnected).",
            "reason",
        )
        self.choices = counter(
            "choices", "Requests for a family, by the chosen model and the reason.", "family", "model", "reason"
        )
        peak = Gauge("stridevit_peak_memory_bytes", "Largest resident memory so far.", registry=registry)
        peak.set_function(peak_bytes)
        ProcessCollector(registry=registry)
        # To find a metric by its labels takes longer than to count.
        self._request = cache(self.requests.labels)
        self._request_seconds = cache(self.request_seconds.labels)
        self._stage = cache(self.stage_seconds.labels)
        self._image = cache(self.images.labels)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count and time an HTTP request."""
        self._request(route, method, status).inc()
        self._request_seconds(route).observe(seconds)

    def stage(self, model: str, stage: str) -> Histogram:
        """The histogram of one stage of one model."""
        return self._stage(model, stage)

    def answered(self, model: str) -> None:
        """Count an image that was answered."""
        self._image(model, "ok").inc()

    def on_batch(self, model: str, images: int, size: int, *, failed: bool) -> None:
        """Count a batch."""
        if failed:
            self.batch_errors.labels(model).inc()
            return
        self.batch_size.labels(model).observe(images)
        self.rows.labels(model, "image").inc(images)
        self.rows.labels(model, "padding").inc(size - images)

    def watch(self, read: Callable[[], Gauges]) -> None:
        """Call `read` at each scrape, for what is a state rather than an event."""
        self._registry.register(_GaugeCollector(read))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)


class _GaugeCollector:
    def __init__(self, read: Callable[[], Gauges]) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        state = self._read()
        yield _gauge("pending_images", "Images accepted and not yet answered.", state.pending_images)
        yield _gauge("pending_bytes", "Bodies accepted and not yet answered.", state.pending_bytes)
        drain = "Predicted time until all accepted work is done, by the cost model."
        yield _gauge("predicted_drain_seconds", drain, state.predicted_drain_seconds)
        slowdown = "Recent duration of batches divided by their duration at warm-up."
        yield _gauge("device_slowdown_ratio", slowdown, state.slowdown)
        depth = _model_gauge("queue_depth", "Images waiting for the engine.")
        info = _model_gauge("model_info", "Models that take traffic; the value is always 1.", "variant")
        memory = _model_gauge(
            "model_memory_bytes",
            "Growth of resident memory while the model was loaded (kind=model) and warmed up (kind=arena).",
            "kind",
        )
        batch = _model_gauge(
            "predicted_batch_seconds", "Predicted duration of a batch, for each batch size in use.", "size"
        )
        for model in state.models:
            labels = [model.name, str(model.version)]
            depth.add_metric(labels, model.queue_depth)
            info.add_metric([*labels, model.variant], 1)
            memory.add_metric([*labels, "model"], model.model_bytes)
            memory.add_metric([*labels, "arena"], model.arena_bytes)
            for size, seconds in model.batch_seconds.items():
                batch.add_metric([*labels, str(size)], seconds)
        yield from (depth, info, memory, batch)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"stridevit_{name}", text, value=value)


def _model_gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"stridevit_{name}", text, labels=["model", "version", *labels])
