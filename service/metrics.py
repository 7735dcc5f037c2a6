"""Prometheus metrics, in base units and with conventional names."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from service.host import peak_bytes

_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets of durations."""
_RATIOS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.3, 1.5, 2.0, 4.0, 10.0)


class Metrics:
    """All metrics of one application: each is called with the values of its labels, then counts or observes."""

    def __init__(self) -> None:
        # Nobody needs to know when a series was created, which would take a third of all lines.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}

        # Cached, because finding a metric by its labels takes longer than counting.
        def counter(name: str, text: str, *labels: str) -> Callable[..., Counter]:
            self._counters[name] = found = Counter(f"stridevit_{name}_total", text, labels, registry=registry)
            return cache(found.labels)

        def histogram(name: str, text: str, *labels: str, buckets: Sequence[float]) -> Callable[..., Histogram]:
            return cache(Histogram(f"stridevit_{name}", text, labels, buckets=buckets, registry=registry).labels)

        self.requests = counter("requests", "HTTP requests answered.", "route", "method", "status")
        self.request_seconds = histogram(
            "request_duration_seconds",
            "Time from the first byte of a request's head to the end of its answer.",
            "route",
            buckets=SECONDS,
        )
        self.images = counter("images", "Images answered, by outcome: ok or the error's code.", "model", "outcome")
        self.stage_seconds = histogram(
            "stage_duration_seconds",
            "Time of one image in a stage (decode, queue, inference), or of its whole request (total).",
            *("model", "stage"),
            buckets=SECONDS,
        )
        self.batch_size = histogram("batch_size", "Images in a batch.", "model", buckets=_BATCH_SIZES)
        self.rows = counter(
            "engine_rows",
            "Rows computed by the engine: images, and the padding that fills a batch up to a warmed-up size.",
            *("model", "kind"),
        )
        self.batch_errors = counter("batch_errors", "Batches in which no image could be answered.", "model")
        self.model_faults = counter(
            "model_faults",
            "Images on which a model failed: the engine raised an error (exception), or its outputs have the wrong "
            "shape (shape) or are NaN or infinite (not-finite).",
            *("model", "kind"),
        )
        self.rejections = counter(
            "rejections",
            "Requests refused (images, bytes, deadline, lag, not-ready, key-rate, key-concurrency) or ended "
            "(deadline-exceeded, client-disconnected).",
            "reason",
        )
        self.predicted_ratio = Histogram(
            "stridevit_predicted_finish_ratio",
            "Predicted time from acceptance to answer, divided by the actual time.",
            buckets=_RATIOS,
            registry=registry,
        )
        self.choices = counter(
            "choices", "Requests for a family, by the chosen model and the reason.", "family", "model", "reason"
        )
        rollout = "kind", "rollout"
        self.rollout_images = counter(
            "rollout_images",
            "Images of split traffic, by arm (primary, candidate) and outcome: ok or the error's code.",
            *(*rollout, "arm", "outcome"),
        )
        self.rollout_compared = counter(
            "rollout_compared",
            "Images answered by both models, by whether their top-1 classes agree or differ.",
            *rollout,
            "top1",
        )
        self.rollout_dropped = counter(
            "rollout_dropped",
            "Images not compared: there was no room (full, bytes); the other model was not serving (not-ready, "
            "unloaded), failed (fault), was the same model (same-model) or has different labels or input (labels, "
            "input); decoding would take too long (large, decode); or the engine hung or stopped (ended).",
            *(*rollout, "reason"),
        )
        self.rollout_fallbacks = counter(
            "rollout_fallbacks",
            "Images of a canary's share that the primary answered because the candidate was not serving (not-ready), "
            "was late or would have been (late), had no room (refused), failed (model-fault), or cannot take the "
            "request (labels, input, top1).",
            *(*rollout, "reason"),
        )
        self.rollout_seconds = histogram(
            "rollout_duration_seconds",
            "Time by arm: of whole requests (canary), or of the engine for every fourth image, which both models "
            "compute in turn (shadow).",
            *(*rollout, "arm"),
            buckets=SECONDS,
        )
        self.connections_closed = counter(
            "connections_closed",
            "Connections closed, by reason: client, answered (Connection: close), a limit, or the error's code.",
            "reason",
        )
        self.open_connections = Gauge("stridevit_open_connections", "Open connections.", registry=registry)
        peak = Gauge("stridevit_peak_memory_bytes", "Largest resident memory so far.", registry=registry)
        peak.set_function(peak_bytes)
        ProcessCollector(registry=registry)

    def totals(self, counter: str) -> Iterator[tuple[dict[str, str], float]]:
        """The labels and the value of each series of a counter, by its name in `_counters`."""
        # Read from the series themselves: `collect` makes samples with all that a scrape needs.
        found = self._counters[counter]
        series: Any = dict(found._metrics)
        for values, one in series.items():
            yield dict(zip(found._labelnames, values, strict=True)), one._value.get()

    def request_buckets(self, model: str) -> list[int]:
        """How many requests of a model took at most each of SECONDS, and at the end how many there were."""
        # As in `totals`: `collect` writes each bound as text, which takes twenty times as long.
        return [
            int(count) for count in accumulate(bucket.get() for bucket in self.stage_seconds(model, "total")._buckets)
        ]

    def request_seconds_sum(self, model: str) -> float:
        """The time that all requests of a model took; it grows with every request."""
        return float(self.stage_seconds(model, "total")._sum.get())

    def rollout_duration(self, kind: str, rollout: str, arm: str) -> tuple[int, float]:
        """How many durations of an arm there were, and their sum."""
        found = self.rollout_seconds(kind, rollout, arm)
        return int(sum(bucket.get() for bucket in found._buckets)), found._sum.get()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
