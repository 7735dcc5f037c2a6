"""Prometheus metrics, in base units and with conventional names."""

from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from service.host import peak_bytes

_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """All metrics of one application."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

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

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
