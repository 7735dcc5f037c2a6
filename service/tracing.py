"""OpenTelemetry traces, with the extra `tracing`: a span a request, one for each stage, `traceparent` taken and given.

The hot path does not touch this: stages are written down as durations, and become spans when the request has ended.
"""

import time
from collections.abc import Mapping
from typing import Any

from service.errors import StartupError

STAGES = ("read", "decode", "queue", "inference")


class Tracing:
    """Sends spans to a collector by OTLP over HTTP, in the background and in batches."""

    def __init__(self, endpoint: str, *, version: str, exporter: Any = None) -> None:
        """`endpoint`: such as http://collector:4318/v1/traces. Raises StartupError without the extra."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415
        except ImportError as error:
            raise StartupError(
                f"otlp_endpoint is set, but {error.name} is not installed: pip install 'stridevit[tracing]'"
            ) from error
        resource = Resource.create({"service.name": "stridevit", "service.version": version})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("stridevit", version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, traceparent: str | None) -> Any:
        """The span of a request that has just arrived, within the caller's trace if it named one."""
        from opentelemetry.trace import SpanKind  # noqa: PLC0415

        context = self._propagator.extract({"traceparent": traceparent} if traceparent else {})
        return self._tracer.start_span(method, context=context, kind=SpanKind.SERVER)

    def traceparent(self, span: Any) -> str:
        """What names `span` to others."""
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier.get("traceparent", "")

    def end(
        self,
        span: Any,
        *,
        name: str,
        attributes: Mapping[str, str | int],
        timings_ms: Mapping[str, float],
    ) -> None:
        """End a request's span; its stages, laid end to end from its start, become its children."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context  # noqa: PLC0415

        span.update_name(name)
        span.set_attributes(attributes)
        if int(attributes["http.response.status_code"]) >= 500:
            span.set_status(Status(StatusCode.ERROR))
        context, at = set_span_in_context(span), span.start_time
        for stage in STAGES:
            if stage in timings_ms:
                child = self._tracer.start_span(stage, context=context, start_time=at)
                at += round(timings_ms[stage] * 1e6)
                child.end(at)
        span.end(max(at, time.time_ns()))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
