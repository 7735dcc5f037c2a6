"""OpenTelemetry traces, with the extra `tracing`: one span per request and one per stage, in the caller's trace.

Names and attributes are those of the semantic conventions for HTTP servers. The SDK's variables OTEL_* apply: name and
attributes of the service, sampling, batches, and the exporter's headers and timeouts.

Stages are recorded as durations and become spans after the request, so that tracing costs the hot path nothing: these
spans are laid end to end, without the gaps between stages.
"""

import time
from collections.abc import Mapping
from typing import Any

from service.errors import StartupError

STAGES = ("read", "decode", "queue", "inference")
CONTEXT = ("traceparent", "tracestate")
"""Headers of W3C Trace Context."""


class Tracing:
    """Sends spans to a collector by OTLP over HTTP, in the background and in batches."""

    def __init__(self, endpoint: str, *, version: str, exporter: Any = None) -> None:
        """`endpoint`: such as http://collector:4318/v1/traces. Raises StartupError without the extra."""
        try:
            from opentelemetry import trace  # noqa: PLC0415
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415
        except ImportError as error:
            raise StartupError(
                f"otlp_endpoint is set, but {error.name} is not installed: pip install 'stridevit[tracing]'"
            ) from error
        self._trace: Any = trace
        own = {"service.name": "stridevit", "service.version": version}
        named_by_environment = OTELResourceDetector().detect().attributes
        self._provider = TracerProvider(resource=Resource.create({**own, **named_by_environment}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("stridevit", version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, headers: Mapping[str, str]) -> Any:
        """Start the span of a request, within the caller's trace if its `traceparent` names one."""
        context = self._propagator.extract({name: headers[name] for name in CONTEXT if name in headers})
        return self._tracer.start_span(method, context=context, kind=self._trace.SpanKind.SERVER)

    def context(self, span: Any) -> dict[str, str]:
        """The headers that identify `span` to others."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._trace.set_span_in_context(span))
        return carrier

    def end(
        self, span: Any, *, name: str, attributes: Mapping[str, str | int], timings_ms: Mapping[str, float]
    ) -> None:
        """End a request's span; its stages become its children, laid end to end from its start."""
        if not span.is_recording():  # the caller, or the sampler, does not want it
            return
        span.update_name(name)
        span.set_attributes(attributes)
        status = int(attributes["http.response.status_code"])
        if status >= 500:
            span.set_attribute("error.type", str(status))
            span.set_status(self._trace.StatusCode.ERROR)
        context, at = self._trace.set_span_in_context(span), span.start_time
        for stage in STAGES:
            if stage in timings_ms:
                child = self._tracer.start_span(stage, context=context, start_time=at)
                at += round(timings_ms[stage] * 1e6)
                child.end(at)
        span.end(max(at, time.time_ns()))

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()
