"""One span per request and one per stage, in the caller's trace."""

import logging
import re
import sys
from pathlib import Path

import pytest
import structlog
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.datastructures import Headers

from service import tracing as tracing_module
from service.app import create_app
from service.errors import StartupError
from service.http.server.protocol import PROBES
from service.settings import Settings
from service.tracing import Tracing, open_tracing
from tests.service.identity import picture, publish_identity

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TestClient, InMemorySpanExporter]:
    """The service, not yet started, with its spans kept here instead of sent over the network."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(
        tracing_module, "Tracing", lambda endpoint, *, version: Tracing(endpoint, version=version, exporter=exporter)
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


def test_a_path_without_a_route_and_an_unknown_method_name_no_span(
    traced: tuple[TestClient, InMemorySpanExporter],
) -> None:
    client, exporter = traced
    with client:
        assert client.get("/secrets/4711").status_code == 404
        assert client.request("PROPFIND", "/v1/models").status_code == 405
    missing, other = exporter.get_finished_spans()
    assert missing.attributes
    assert other.attributes
    assert (missing.name, missing.attributes["http.request.method"]) == ("GET", "GET")
    assert not {"http.route", "stridevit.model", "http.request.method_original"} & set(missing.attributes)
    assert (other.name, other.attributes["http.route"]) == ("HTTP /v1/models", "/v1/models")
    assert other.attributes["http.request.method"] == "_OTHER"
    assert other.attributes["http.request.method_original"] == "PROPFIND"


def test_the_state_may_come_in_several_headers(traced: tuple[TestClient, InMemorySpanExporter]) -> None:
    client, exporter = traced
    headers = [("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "one=1"), ("tracestate", "two=2")]
    with client:
        assert client.get("/v1/models", headers=headers).headers["tracestate"] == "one=1,two=2"
    (span,) = exporter.get_finished_spans()
    assert span.context
    assert dict(span.context.trace_state) == {"one": "1", "two": "2"}


def test_what_clients_send_in_these_headers_is_not_logged(
    traced: tuple[TestClient, InMemorySpanExporter], caplog: pytest.LogCaptureFixture
) -> None:
    client, _ = traced
    parent = f"00-{TRACE}-{PARENT}-01"
    with client, caplog.at_level(logging.INFO):
        for state in ("FORGED LINE", "a=1,a=2", ",".join(f"k{number}=1" for number in range(40))):
            client.get("/v1/models", headers={"traceparent": parent, "tracestate": state})
        client.get("/v1/models", headers={"traceparent": "FORGED LINE"})
    assert [record for record in caplog.records if record.name.startswith("opentelemetry")] == []


@pytest.mark.parametrize("path", [*PROBES, "/v2/models/identity-a/ready", "/v2/models/identity-a/versions/1/ready"])
def test_probes_are_not_traced(path: str, traced: tuple[TestClient, InMemorySpanExporter]) -> None:
    client, exporter = traced
    with client:
        assert "traceparent" not in client.get(path).headers
    assert exporter.get_finished_spans() == ()


def end(tracing: Tracing, status: int) -> None:
    """A whole request."""
    span = tracing.begin("GET", Headers())
    tracing.end(span, method="GET", route="/", attributes={"http.response.status_code": status}, timings_ms={})


@pytest.mark.parametrize(("status", "kind"), [(503, "503"), (429, None)])
def test_an_error_of_the_service_is_the_type_of_its_span(status: int, kind: str | None) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing("http://127.0.0.1:1", version="1", exporter=exporter)
    end(tracing, status)
    tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.attributes
    assert (span.attributes.get("error.type"), span.status.is_ok) == (kind, kind is None)


def test_the_environment_names_the_service_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    exporter = InMemorySpanExporter()
    tracing = Tracing("http://127.0.0.1:1", version="1", exporter=exporter)
    end(tracing, 200)
    tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.resource.attributes["service.name"] == "pictures"
    assert span.resource.attributes["service.version"] == "1"
    assert span.resource.attributes["deployment.environment.name"] == "test"
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    silent = Tracing("http://127.0.0.1:1", version="1", exporter=InMemorySpanExporter())
    assert not silent.begin("GET", Headers()).is_recording()
    silent.close()


@pytest.mark.parametrize(
    ("setting", "environment", "endpoint"),
    [
        (None, {}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/"}, "http://c:4318/v1/traces"),
        (
            None,
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/here"},
            "http://t/here",
        ),
        ("http://own/v1/traces", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "http://own/v1/traces"),
        ("http://own/v1/traces", {"OTEL_TRACES_EXPORTER": "otlp"}, "http://own/v1/traces"),
        ("http://own/v1/traces", {"OTEL_TRACES_EXPORTER": "none"}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, None),
    ],
)
def test_the_standard_variables_name_the_collector_or_switch_traces_off(
    setting: str | None, environment: dict[str, str], endpoint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def opening(endpoint: str, *, version: str) -> None:
        opened.append(endpoint)

    monkeypatch.setattr(tracing_module, "Tracing", opening)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    open_tracing(setting, version="1")
    assert opened == ([endpoint] if endpoint else [])


def test_a_collector_of_the_environment_alone_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    with structlog.testing.capture_logs() as lines:
        assert open_tracing(None, version="1") is None
    (line,) = lines
    assert (line["log_level"], "pip install 'stridevit[tracing]'" in line["reason"]) == ("warning", True)
    with pytest.raises(StartupError):
        open_tracing("http://127.0.0.1:1", version="1")


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError, match=r"pip install 'stridevit\[tracing\]'"):
        Tracing("http://127.0.0.1:1", version="1")


def test_tracing_is_off_unless_asked_for(client: TestClient) -> None:
    assert "traceparent" not in client.get("/healthz").headers
