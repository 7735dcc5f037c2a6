"""Prometheus metrics, in base units and with conventional names. One registry an app."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """All metrics of one app."""

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
            "From the first byte of a request's head to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.images = Counter(
            "stridevit_images_total",
            "Images answered, by outcome: ok or the kind of error.",
            ["model", "outcome"],
            registry=self._registry,
        )
        self.stage_seconds = Histogram(
            "stridevit_stage_duration_seconds",
            "Time of one image in a stage: decode, queue or inference.",
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
        self.pending = Gauge(
            "stridevit_pending_images", "Images accepted and not yet answered.", registry=self._registry
        )
        self.model_info = Gauge(
            "stridevit_model_info",
            "Models that take traffic; the value is always 1.",
            ["model", "version", "variant"],
            registry=self._registry,
        )

    def on_batch(self, model: str, size: int, _seconds: float) -> None:
        """Count a batch; the scheduler calls this."""
        self.batch_size.labels(model).observe(size)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)
