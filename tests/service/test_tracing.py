"""One span per request and one per stage, in the caller's trace."""

import re
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service import app as app_module
from service.app import create_app
from service.errors import StartupError
from service.http.server.protocol import PROBES
from service.settings import Settings
from service.tracing import Tracing
from tests.service.identity import picture, publish_identity

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TestClient, InMemorySpanExporter]:
    """The service, not yet started, with its spans kept here instead of sent over the network."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(
        app_module, "Tracing", lambda endpoint, *, version: Tracing(endpoint, version=version, exporter=exporter)
    )
    publish_identity(tmp_path)
    settings = Settings(repository=tmp_path, threads=1, otlp_endpoint="http://127.0.0.1:1/v1/traces")
    return TestClient(create_app(settings)), exporter


def test_a_request_and_its_stages_are_spans_of_the_caller_s_trace(
    traced: tuple[TestClient, InMemorySpanExporter],
) -> None:
    client, exporter = traced
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "r-1"}
    with client:
        answer = client.post("/v1/classify", content=picture(1), headers=headers)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"POST /v1/classify", "read", "decode", "queue", "inference"}
    whole = spans["POST /v1/classify"]
    assert whole.context
    assert whole.parent
    assert whole.attributes
    assert (f"{whole.context.trace_id:032x}", f"{whole.parent.span_id:016x}") == (TRACE, PARENT)
    assert whole.attributes["stridevit.request_id"] == "r-1"
    assert whole.attributes["stridevit.model"] == "identity-a"
    assert whole.attributes["http.response.status_code"] == 200
    assert (whole.attributes["url.path"], whole.attributes["url.scheme"]) == ("/v1/classify", "http")
    for stage in ("read", "decode", "queue", "inference"):
        span = spans[stage]
        assert span.parent
        assert span.parent.span_id == whole.context.span_id
        assert span.start_time
        assert span.end_time
        assert (span.end_time - span.start_time) / 1e6 == pytest.approx(answer.json()["timings_ms"][stage], abs=0.001)
    passed_on = re.fullmatch(rf"00-{TRACE}-([0-9a-f]{{16}})-01", answer.headers["traceparent"])
    assert passed_on
    assert passed_on[1] == f"{whole.context.span_id:016x}"


def test_without_a_caller_s_trace_a_new_one_begins_and_a_malformed_one_is_ignored(
    traced: tuple[TestClient, InMemorySpanExporter],
) -> None:
    client, exporter = traced
    with client:
        for headers in ({}, {"traceparent": "nonsense"}):
            assert client.get("/v1/models", headers=headers).headers["traceparent"].startswith("00-")
    assert [span.parent for span in exporter.get_finished_spans()] == [None, None]


def test_the_state_of_the_caller_s_trace_is_passed_on(traced: tuple[TestClient, InMemorySpanExporter]) -> None:
    client, exporter = traced
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    with client:
        assert client.get("/v1/models", headers=headers).headers["tracestate"] == "vendor=1"
    (span,) = exporter.get_finished_spans()
    assert span.context
    assert span.context.trace_state.get("vendor") == "1"


def test_what_the_caller_does_not_sample_is_answered_and_leaves_no_span(
    traced: tuple[TestClient, InMemorySpanExporter],
) -> None:
    client, exporter = traced
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    with client:
        answer = client.post("/v1/classify", content=picture(1), headers=headers)
    assert answer.status_code == 200
    assert answer.headers["traceparent"].endswith("-00")
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize("path", PROBES)
def test_probes_are_not_traced(path: str, traced: tuple[TestClient, InMemorySpanExporter]) -> None:
    client, exporter = traced
    with client:
        assert "traceparent" not in client.get(path).headers
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize(("status", "kind"), [(503, "503"), (429, None)])
def test_an_error_of_the_service_is_the_type_of_its_span(status: int, kind: str | None) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing("http://127.0.0.1:1", version="1", exporter=exporter)
    tracing.end(tracing.begin("GET", {}), name="x", attributes={"http.response.status_code": status}, timings_ms={})
    tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.attributes
    assert (span.attributes.get("error.type"), span.status.is_ok) == (kind, kind is None)


def test_the_environment_names_the_service_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    exporter = InMemorySpanExporter()
    tracing = Tracing("http://127.0.0.1:1", version="1", exporter=exporter)
    tracing.end(tracing.begin("GET", {}), name="x", attributes={"http.response.status_code": 200}, timings_ms={})
    tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.resource.attributes["service.name"] == "pictures"
    assert span.resource.attributes["service.version"] == "1"
    assert span.resource.attributes["deployment.environment.name"] == "test"
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    silent = Tracing("http://127.0.0.1:1", version="1", exporter=InMemorySpanExporter())
    assert not silent.begin("GET", {}).is_recording()
    silent.close()


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError, match=r"pip install 'stridevit\[tracing\]'"):
        Tracing("http://127.0.0.1:1", version="1")


def test_tracing_is_off_unless_asked_for(client: TestClient) -> None:
    assert "traceparent" not in client.get("/healthz").headers
