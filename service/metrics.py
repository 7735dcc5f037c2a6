"""Prometheus metrics, in base units and with conventional names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from service.host import peak_bytes

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
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "stridevit_requests_total",
            "HTTP requests answered.",
            ["route", "method", "status"],
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "stridevit_request_duration_seconds",
            "Time from the first byte of a request's head to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.images = Counter(
            "stridevit_images_total",
            "Images answered, by outcome: ok or the error's code.",
            ["model", "outcome"],
            registry=self._registry,
        )
        self.stage_seconds = Histogram(
            "stridevit_stage_duration_seconds",
            "Time of one image in a stage (decode, queue, inference), or of its whole request (total).",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.batch_size = Histogram(
            "stridevit_batch_size",
            "Images in a batch.",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self._registry,
        )
        self.rows = Counter(
            "stridevit_engine_rows_total",
            "Rows computed by the engine: images, and the padding that fills a batch up to a warmed-up size.",
            ["model", "kind"],
            registry=self._registry,
        )
        self.batch_errors = Counter(
            "stridevit_batch_errors_total",
            "Batches that the engine could not run.",
            ["model"],
            registry=self._registry,
        )
        self.rejections = Counter(
            "stridevit_rejections_total",
            "Requests refused or dropped: images, bytes, deadline (429), expired (504), hung_up.",
            ["reason"],
            registry=self._registry,
        )
        self.choices = Counter(
            "stridevit_choices_total",
            "Requests for a family, by the chosen model and the reason.",
            ["family", "model", "reason"],
            registry=self._registry,
        )
        Gauge("stridevit_peak_memory_bytes", "Largest resident memory so far.", registry=self._registry).set_function(
            peak_bytes
        )
        ProcessCollector(registry=self._registry)
        self._stages: dict[tuple[str, str], Histogram] = {}
        self._requests: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._answered: dict[str, Counter] = {}

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count and time an HTTP request."""
        key = (route, method, status)
        if key not in self._requests:
            self._requests[key] = (self.requests.labels(*key), self.request_seconds.labels(route))
        counter, histogram = self._requests[key]
        counter.inc()
        histogram.observe(seconds)

    def stage(self, model: str, stage: str) -> Histogram:
        """The histogram of one stage of one model, looked up once."""
        key = (model, stage)
        if key not in self._stages:
            self._stages[key] = self.stage_seconds.labels(model, stage)
        return self._stages[key]

    def answered(self, model: str) -> None:
        """Count an image that was answered."""
        if model not in self._answered:
            self._answered[model] = self.images.labels(model, "ok")
        self._answered[model].inc()

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
        yield _gauge("stridevit_pending_images", "Images accepted and not yet answered.", state.pending_images)
        yield _gauge("stridevit_pending_bytes", "Bodies accepted and not yet answered.", state.pending_bytes)
        yield _gauge(
            "stridevit_predicted_drain_seconds",
            "Predicted time until all accepted work is done, by the cost model.",
            state.predicted_drain_seconds,
        )
        yield _gauge(
            "stridevit_device_slowdown_ratio",
            "Recent duration of batches divided by their duration at warm-up.",
            state.slowdown,
        )
        by_model = ["model", "version"]
        depth = GaugeMetricFamily("stridevit_queue_depth", "Images waiting for the engine.", labels=by_model)
        info = GaugeMetricFamily(
            "stridevit_model_info", "Models that take traffic; the value is always 1.", labels=[*by_model, "variant"]
        )
        memory = GaugeMetricFamily(
            "stridevit_model_memory_bytes",
            "Growth of resident memory while the model was loaded (kind=model) and warmed up (kind=arena).",
            labels=[*by_model, "kind"],
        )
        batch = GaugeMetricFamily(
            "stridevit_predicted_batch_seconds",
            "Predicted duration of a batch, for each batch size in use.",
            labels=[*by_model, "size"],
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
    return GaugeMetricFamily(name, text, value=value)
