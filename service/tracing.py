"""OpenTelemetry traces, with the extra `tracing`: one span per request and one per stage, in the caller's trace.

Names and attributes are those of the semantic conventions for HTTP servers. The SDK's variables OTEL_* apply: name and
attributes of the service, sampling, batches, the exporter's headers and timeouts, and the collector's address unless
`otlp_endpoint` names it; `OTEL_TRACES_EXPORTER=none` and `OTEL_SDK_DISABLED=true` switch traces off.

Stages are recorded as durations and become spans after the request, so that tracing costs the hot path nothing: these
spans are laid end to end, without the gaps between stages.
"""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import structlog
from starlette.datastructures import Headers

from service.errors import StartupError

STAGES = ("read", "decode", "queue", "inference")
CONTEXT = ("traceparent", "tracestate")
"""Headers of W3C Trace Context."""
_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "CONNECT", "TRACE")
"""Those that the semantic conventions know; spans of any other would be as many kinds as clients think of."""
_WRITE_WHAT_CLIENTS_SENT = ("opentelemetry.trace.span", "opentelemetry.trace.propagation.tracecontext")
"""Loggers that warn of each malformed header, with its text."""

log = structlog.get_logger()


def open_tracing(endpoint: str | None, *, version: str) -> "Tracing | None":
    """Tracing to `endpoint`, else to what OTEL_EXPORTER_OTLP_ENDPOINT names; None if neither does or traces are off.

    Raises StartupError without the extra if `endpoint` is given. The environment is often that of all services of a
    cluster: if only that names a collector, the missing extra is a warning.
    """
    if _switched_off(os.environ) or not (named := endpoint or _endpoint(os.environ)):
        return None
    try:
        return Tracing(named, version=version)
    except StartupError as error:
        if endpoint:
            raise
        log.warning("no traces", reason=str(error))
        return None


def _switched_off(environment: Mapping[str, str]) -> bool:
    return (
        environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none"
        or environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    )


def _endpoint(environment: Mapping[str, str]) -> str | None:
    """The URL of a collector's traces. That of all signals is a base to which the path of each is added."""
    if whole := environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "").strip():
        return whole
    base = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
    return f"{base.rstrip('/')}/v1/traces" if base else None


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
                f"traces are to be sent to {endpoint}, but {error.name} is not installed: pip install "
                "'stridevit[tracing]', or set OTEL_TRACES_EXPORTER=none"
            ) from error
        self._trace: Any = trace
        own = {"service.name": "stridevit", "service.version": version}
        named_by_environment = OTELResourceDetector().detect().attributes
        self._provider = TracerProvider(resource=Resource.create({**own, **named_by_environment}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("stridevit", version)
        self._propagator = TraceContextTextMapPropagator()
        for name in _WRITE_WHAT_CLIENTS_SENT:
            logging.getLogger(name).setLevel(logging.ERROR)

    def begin(self, method: str, headers: Headers) -> Any:
        """Start the span of a request, within the caller's trace if its `traceparent` names one."""
        # A list may be split over several headers.
        context = self._propagator.extract(
            {name: ",".join(values) for name in CONTEXT if (values := headers.getlist(name))}
        )
        return self._tracer.start_span(method, context=context, kind=self._trace.SpanKind.SERVER)

    def context(self, span: Any) -> dict[str, str]:
        """The headers that identify `span` to others."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._trace.set_span_in_context(span))
        return carrier

    def end(
        self,
        span: Any,
        *,
        method: str,
        route: str | None,
        attributes: Mapping[str, str | int],
        timings_ms: Mapping[str, float],
    ) -> None:
        """End a request's span; its stages become its children, laid end to end from its start.

        `route`: the template of its path, None if no route was found. Empty `attributes` are left out.
        """
        if not span.is_recording():  # the caller, or the sampler, does not want it
            return
        known = method in _METHODS
        # Without a route the name is the method alone: a path would make as many names as clients think of.
        span.update_name(" ".join(filter(None, (method if known else "HTTP", route))))
        span.set_attributes({"http.request.method": method if known else "_OTHER"})
        if not known:
            span.set_attribute("http.request.method_original", method)
        if route:
            span.set_attribute("http.route", route)
        span.set_attributes({name: value for name, value in attributes.items() if value != ""})
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
