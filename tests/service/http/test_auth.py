"""API keys and the admin key, and which web pages may call the service."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service import tracing as tracing_module
from service.app import create_app
from service.keys import new_key
from service.settings import Settings
from service.tracing import Tracing
from tests.service.identity import picture, publish_identity

KEY, KEY_HASH = new_key()
OTHER, OTHER_HASH = new_key()
ADMIN, ADMIN_HASH = new_key()


def client_of(tmp_path: Path, **values: object) -> TestClient:
    publish_identity(tmp_path)
    return TestClient(create_app(Settings(repository=tmp_path, threads=1, **values)))  # type: ignore[arg-type]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_keys_everybody_has_access(tmp_path: Path) -> None:
    with client_of(tmp_path) as client:
        assert client.post("/v1/classify", content=picture(1)).status_code == 200


def test_with_keys_only_those_who_have_one_have_access(tmp_path: Path) -> None:
    with client_of(tmp_path, api_key_hashes=(KEY_HASH, OTHER_HASH), admin_key_hash=ADMIN_HASH) as client:
        by_hand = {"authorization": f"bearer {KEY}"}
        for headers in (bearer(KEY), bearer(OTHER), {"X-API-Key": KEY}, bearer(ADMIN), by_hand):
            assert client.post("/v1/classify", content=picture(1), headers=headers).status_code == 200
        for headers in ({}, bearer(KEY_HASH), bearer(""), {"Authorization": f"Basic {KEY}"}, {"X-API-Key": KEY + "x"}):
            refused = client.post("/v1/classify", content=picture(1), headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["request_id"] == refused.headers["x-request-id"]
            assert KEY not in refused.text
        for path in ("/v1/models", "/v2", "/v2/models/identity-a"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers=bearer(KEY)).status_code == 200
        assert client.get("/v2/models/identity-a").json().keys() == {"error"}


def test_probes_and_the_page_need_no_key(tmp_path: Path) -> None:
    with client_of(tmp_path, api_key_hashes=(KEY_HASH,)) as client:
        for path in ("/", "/healthz", "/readyz", "/metrics", "/docs", "/v2/health/live", "/v2/health/ready"):
            assert client.get(path).status_code == 200, path


def test_loading_is_off_without_an_admin_key(tmp_path: Path) -> None:
    with client_of(tmp_path) as client:
        for action in ("load", "unload"):
            refused = client.post(f"/v2/repository/models/identity-a/{action}", headers=bearer(ADMIN))
            assert refused.status_code == 403
            assert "switched off" in refused.json()["error"]
        assert client.post("/v2/repository/index").json()[0]["state"] == "READY"


@pytest.mark.parametrize("end", ["", "%0A", "/", "%0D%0A"])
def test_no_path_bypasses_the_admin_key(tmp_path: Path, end: str) -> None:
    with client_of(tmp_path) as client:
        assert client.post(f"/v2/repository/models/identity-a/unload{end}").status_code == 403
        assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize("keys", [(), (KEY_HASH,)])
def test_loading_needs_the_admin_key(tmp_path: Path, keys: tuple[str, ...]) -> None:
    with client_of(tmp_path, api_key_hashes=keys, admin_key_hash=ADMIN_HASH) as client:
        for headers in ({}, bearer(KEY)):
            refused = client.post("/v2/repository/models/identity-a/unload", headers=headers)
            assert refused.status_code == 403
            assert "admin key" in refused.json()["error"]
        assert client.post("/v2/repository/models/identity-a/load", headers=bearer(ADMIN)).json() == {}


def test_odd_paths_bypass_no_key(tmp_path: Path) -> None:
    paths = (
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/V1/models",
        "/v2/health/live/../../models/x",
        "/v1/%6dodels",
        "/v1/models%0A",
        "/v2%0A",
        "/hf//identity-a",
        "//hf/identity-a",
    )
    with client_of(tmp_path, api_key_hashes=(KEY_HASH,)) as client:
        for path in paths:
            answer = client.get(path, follow_redirects=True)
            assert answer.status_code in (401, 404), path


def test_web_pages_of_other_origins_have_access_only_if_the_settings_say_so(tmp_path: Path) -> None:
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    with client_of(tmp_path) as client:
        assert "access-control-allow-origin" not in client.options("/v1/classify", headers=asked).headers
    with client_of(tmp_path, cors_origins=("https://shop.example",), api_key_hashes=(KEY_HASH,)) as client:
        allowed = client.options("/v1/classify", headers={**asked, "Access-Control-Request-Headers": "authorization"})
        assert allowed.status_code == 200, "a preflight has no key"
        assert allowed.headers["access-control-allow-origin"] == "https://shop.example"
        other = client.options("/v1/classify", headers={**asked, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_either_header_is_enough_if_it_has_a_right_key(tmp_path: Path) -> None:
    with client_of(tmp_path, api_key_hashes=(KEY_HASH,)) as client:
        for headers in ({**bearer("wrong"), "X-API-Key": KEY}, {"X-API-Key": "wrong", **bearer(KEY)}):
            assert client.get("/v1/models", headers=headers).status_code == 200
        wrong = client.get("/v1/models", headers={**bearer("wrong"), "X-API-Key": "wrong"})
        assert (wrong.status_code, wrong.json()["detail"]) == (401, "this API key is not valid")
        assert "an API key is needed: send it as" in client.get("/v1/models").json()["detail"]


ENTRIES = f"""
[[keys]]
name = "reader"
sha256 = "{KEY_HASH}"
scopes = ["read"]

[[keys]]
name = "shop"
sha256 = "{OTHER_HASH}"
scopes = ["classify"]

[[keys]]
name = "operator"
sha256 = "{ADMIN_HASH}"
scopes = ["admin"]
"""


def file_of(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    return path


def test_a_key_may_do_what_its_scopes_say_and_nothing_else(tmp_path: Path) -> None:
    unload = "/v2/repository/models/identity-a/unload"
    infer = "/v2/models/identity-a/infer"
    allowed = {
        ("POST", "/v1/classify"): {OTHER},
        ("POST", infer): {OTHER},
        ("GET", "/metrics"): {KEY},
        ("GET", "/docs"): {KEY},
        ("GET", "/openapi.json"): {KEY},
        ("GET", "/v1/models"): {KEY, OTHER, ADMIN},
        ("POST", "/v2/repository/index"): {KEY, OTHER, ADMIN},
        ("POST", unload): {ADMIN},
    }
    pages = ("metrics", "docs")
    with client_of(tmp_path, keys_file=file_of(tmp_path, ENTRIES), guarded_pages=pages) as client:
        for (method, path), keys in allowed.items():
            for key in (KEY, OTHER, ADMIN):
                status = client.request(method, path, content=picture(1), headers=bearer(key)).status_code
                assert (status != 403) == (key in keys), (method, path, key, status)
            assert client.request(method, path).status_code == (403 if path == unload else 401)
        refused = client.post("/v1/classify", headers=bearer(KEY)).json()
        assert refused["detail"] == "the key reader lacks the scope classify, which this needs"


def test_a_file_without_keys_lets_nobody_in(tmp_path: Path) -> None:
    with client_of(tmp_path, keys_file=file_of(tmp_path, "")) as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/readyz").status_code == 200


def test_an_expired_key_is_refused_by_name(tmp_path: Path) -> None:
    text = ENTRIES + "expires = 2020-01-01T00:00:00Z\n"
    with client_of(tmp_path, keys_file=file_of(tmp_path, text)) as client:
        refused = client.get("/v1/models", headers=bearer(ADMIN))
        assert refused.status_code == 401
        assert "operator has expired" in refused.json()["detail"]
        assert client.post("/v2/repository/models/identity-a/unload", headers=bearer(ADMIN)).status_code == 403


def test_a_key_s_rate_is_limited_and_others_are_not(tmp_path: Path) -> None:
    text = ENTRIES.replace('["classify"]', '["classify"]\nrequests_per_second = 0.001\nburst = 2')

    with client_of(tmp_path, keys_file=file_of(tmp_path, text)) as client:
        for _ in range(2):
            assert client.post("/v1/classify", content=picture(1), headers=bearer(OTHER)).status_code == 200
        refused = client.post("/v1/classify", content=picture(1), headers=bearer(OTHER))
        assert refused.status_code == 429
        assert refused.json()["code"] == "key-limited"
        assert 900 < int(refused.headers["retry-after"]) <= 1000
        assert client.get("/v1/models", headers=bearer(KEY)).status_code == 200
        metrics = client.get("/metrics").text
        assert 'stridevit_rejections_total{reason="key-rate"} 1.0' in metrics
        assert 'stridevit_key_requests_total{key="shop",status="200"} 2.0' in metrics
        assert 'stridevit_key_requests_total{key="shop",status="429"} 1.0' in metrics
        assert OTHER not in metrics
        assert OTHER_HASH not in metrics


def test_a_key_s_requests_at_once_are_limited_before_a_body_is_read(tmp_path: Path) -> None:
    """By ASGI itself, since clients here send the body whatever is answered."""
    publish_identity(tmp_path)
    text = ENTRIES.replace('["classify"]', '["classify"]\nmax_concurrent = 1')
    app = create_app(Settings(repository=tmp_path, threads=1, keys_file=file_of(tmp_path, text)))
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/classify",
        "raw_path": b"/v1/classify",
        "query_string": b"",
        "headers": [(b"x-api-key", OTHER.encode())],
    }

    async def ask(receive: Callable[[], Awaitable[Any]]) -> int:
        statuses: list[int] = []

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await app(dict(scope), receive, send)
        return statuses[0]

    async def scenario() -> list[int]:
        arrived, gone = asyncio.Event(), asyncio.Event()

        async def slow() -> Any:
            arrived.set()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def untouched() -> Any:
            raise AssertionError("the body was read")

        app.state.pipeline.start()
        first = asyncio.create_task(ask(slow))
        await arrived.wait()
        second = await ask(untouched)
        gone.set()
        statuses = [await first, second, await ask(slow)]
        await app.state.pipeline.close()
        return statuses

    assert asyncio.run(scenario()) == [408, 429, 408]


def test_the_log_and_the_trace_name_the_key_and_never_show_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(
        tracing_module, "Tracing", lambda endpoint, *, version: Tracing(endpoint, version=version, exporter=exporter)
    )
    values = {"log_requests": "all", "otlp_endpoint": "http://127.0.0.1:1/v1/traces"}
    with (
        structlog.testing.capture_logs() as lines,
        client_of(tmp_path, keys_file=file_of(tmp_path, ENTRIES), **values) as client,
    ):
        client.post("/v1/classify", content=picture(1), headers=bearer(OTHER))
        client.get("/v1/models")
    named = [line["key"] for line in lines if line["event"] == "request"]
    assert named == ["shop", None]
    spans = exporter.get_finished_spans()
    assert [span.attributes.get("stridevit.key") for span in spans if span.attributes and span.parent is None] == [
        "shop",
        None,
    ]
    said = f"{lines} {[span.to_json() for span in spans]}"
    assert OTHER not in said
    assert OTHER_HASH not in said


def test_guarded_pages_without_any_key_are_an_error() -> None:
    with pytest.raises(ValueError, match="guarded_pages needs keys"):
        Settings(guarded_pages=("metrics",))
