"""docs/http.md, from /openapi.json, and docs/metrics.md, from /metrics, of one application."""

from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from service.app import create_app
from service.settings import Settings
from tests.documentation.reference import markdown
from tests.processes import ROOT

_MODEL = "cifar100-csra-r2"
_KEY = "documentation"
_TITLES = {"operation": "Operation", "page": "Page"}
_HTTP = """
Every route of the service, as `/openapi.json` describes it; a running service shows the same at `/docs`, with examples.
How options, bodies, errors and keys work is in [service.md](service.md).
"""
_METRICS = """
What `/metrics` of a service gives, in the text format of Prometheus. Counters end in `_total`; a histogram has
`_bucket`, `_sum` and `_count`. Which of them to watch is in [monitoring.md](monitoring.md).
"""


@cache
def application() -> FastAPI:
    """A service with one of the shipped models and with a key, whose metrics have labels too."""
    return create_app(
        Settings(repository=ROOT / "models", models=(_MODEL,), admin_key_hash=sha256(_KEY.encode()).hexdigest())
    )


def http_page() -> str:
    """Every route: its parameters, body and answers; then the schemas."""
    document = application().openapi()
    by_tag: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tag = operation.get("tags", ["operation"])[0]
            by_tag.setdefault(tag, []).append("\n\n".join(_operation(path, method, operation)))
    routes = [part for tag, parts in by_tag.items() for part in (f"## {_TITLES.get(tag, tag)}", *parts)]
    schemas = document["components"]["schemas"]
    return markdown.page("HTTP", "/openapi.json", _HTTP, *routes, "## Schemas", *markdown.sections(schemas))


def metrics_page() -> str:
    """Every metric: its kind, its labels and its text."""
    with TestClient(application()) as client:
        client.get("/v1/models", headers={"X-API-Key": _KEY})
    rows = sorted(_metrics(application().state.pipeline.metrics.registry))
    heads = ["metric", "kind", "labels", "what it is"]
    return markdown.page("Metrics", "/metrics", _METRICS, markdown.table(heads, rows))


def _operation(path: str, method: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### {method.upper()} `{path}`"
    yield " ".join(operation.get("description", operation.get("summary", "")).split())
    if parameters := operation.get("parameters"):
        rows = (_parameter(one["name"], one["in"], one.get("schema", {}), markdown.text(one)) for one in parameters)
        yield markdown.table(["parameter", "in", "value", "what it is"], rows)
    if body := operation.get("requestBody"):
        bodies = ((f"`{media}`", markdown.kind(given.get("schema", {}))) for media, given in body["content"].items())
        yield markdown.table(["body", "value"], bodies)
    answers = (
        (status, " or ".join(_bodies(answer)) or "–", markdown.text(answer))
        for status, answer in sorted(operation["responses"].items())
    )
    yield markdown.table(["status", "answer", "when"], answers)


def _parameter(name: str, place: str, schema: markdown.Schema, text: str) -> tuple[str, str, str, str]:
    return f"`{name}`", place, markdown.kind(schema), text or markdown.text(schema)


def _bodies(answer: dict[str, Any]) -> list[str]:
    return [markdown.kind(given.get("schema", {})) for given in answer.get("content", {}).values()]


def _metrics(registry: CollectorRegistry) -> Iterator[tuple[str, str, str, str]]:
    # A counter that was not used yet has no samples, so its labels are asked of the object that declares it.
    declared = {
        name: collector._labelnames
        for name, collector in registry._names_to_collectors.items()
        if isinstance(collector, MetricWrapperBase)
    }
    for family in registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        sampled = {label for sample in family.samples for label in sample.labels if label not in ("le", "quantile")}
        labels = declared.get(name) or declared.get(family.name) or sorted(sampled)
        yield f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels) or "–", family.documentation
