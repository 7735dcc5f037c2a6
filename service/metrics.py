"""Prometheus metrics, in base units and with conventional names."""

from collections.abc import Callable, Sequence
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from service.host import peak_bytes

_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_RATIOS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.3, 1.5, 2.0, 4.0, 10.0)


class Metrics:
    """All metrics of one application: each is called with the values of its labels, then counts or observes."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        # Cached, because to find a metric by its labels takes longer than to count.
        def counter(name: str, text: str, *labels: str) -> Callable[..., Counter]:
            return cache(Counter(f"stridevit_{name}_total", text, labels, registry=registry).labels)

        def histogram(name: str, text: str, *labels: str, buckets: Sequence[float]) -> Callable[..., Histogram]:
            return cache(Histogram(f"stridevit_{name}", text, labels, buckets=buckets, registry=registry).labels)

        self.requests = counter("requests", "HTTP requests answered.", "route", "method", "status")
        self.request_seconds = histogram(
            "request_duration_seconds",
            "Time from the first byte of a request's head to the end of its answer.",
            "route",
            buckets=_SECONDS,
        )
        self.images = counter("images", "Images answered, by outcome: ok or the error's code.", "model", "outcome")
        self.stage_seconds = histogram(
            "stage_duration_seconds",
            "Time of one image in a stage (decode, queue, inference), or of its whole request (total).",
            *("model", "stage"),
            buckets=_SECONDS,
        )
        self.batch_size = histogram("batch_size", "Images in a batch.", "model", buckets=_BATCH_SIZES)
        self.rows = counter(
            "engine_rows",
            "Rows computed by the engine: images, and the padding that fills a batch up to a warmed-up size.",
            *("model", "kind"),
        )
        self.batch_errors = counter("batch_errors", "Batches that the engine could not run.", "model")
        self.rejections = counter(
            "rejections",
            "Requests refused (images, bytes, deadline, lag) or dropped (deadline-exceeded, client-disconnected).",
            "reason",
        )
        self.predicted_ratio = Histogram(
            "stridevit_predicted_finish_ratio",
            "Predicted time from acceptance to the answer, divided by the time that it took.",
            buckets=_RATIOS,
            registry=registry,
        )
        self.choices = counter(
            "choices", "Requests for a family, by the chosen model and the reason.", "family", "model", "reason"
        )
        peak = Gauge("stridevit_peak_memory_bytes", "Largest resident memory so far.", registry=registry)
        peak.set_function(peak_bytes)
        ProcessCollector(registry=registry)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
