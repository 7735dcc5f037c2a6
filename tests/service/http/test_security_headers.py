"""What browsers are told about each answer, errors too."""

import base64
import hashlib
import re

import pytest
from fastapi.testclient import TestClient

from service.http import page
from service.http.security_headers import page_headers
from service.pipeline import Pipeline
from tests.service.conftest import PNG

EVERYWHERE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}


def policy(headers: object) -> dict[str, list[str]]:
    """A Content-Security-Policy by directive."""
    text = dict(headers)["content-security-policy"]  # type: ignore[call-overload]
    return {name: sources for name, *sources in (directive.split() for directive in text.split(";"))}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/classify", 200),
        ("POST", "/v1/classify?top_k=none", 422),
        ("GET", "/v1/models", 200),
        ("GET", "/v2", 200),
        ("POST", "/v2/models/x/infer", 404),
        ("POST", "/v2/repository/models/x/load", 403),
        ("GET", "/metrics", 200),
        ("GET", "/healthz", 200),
        ("GET", "/no/such/path", 404),
        ("DELETE", "/v1/classify", 405),
        ("GET", "/openapi.json", 200),
    ],
)
def test_every_answer_says_that_nothing_may_be_made_of_it(
    method: str, path: str, status: int, client: TestClient
) -> None:
    answer = client.request(method, path, content=PNG)
    assert answer.status_code == status
    assert answer.headers.items() >= EVERYWHERE.items()
    assert answer.headers["cache-control"] == "no-store"
    assert policy(answer.headers)["default-src"] == ["'none'"]
    assert policy(answer.headers)["frame-ancestors"] == ["'none'"]
    names = [name for name, _ in answer.headers.multi_items()]
    assert len(names) == len(set(names)), "no header twice"


def test_a_fault_s_answer_has_them_too(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(Pipeline, "answer", fail)
    answer = client.post("/v1/classify", content=PNG)
    assert answer.status_code == 500
    assert answer.headers.items() >= EVERYWHERE.items()
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_may_run_its_own_scripts_and_load_nothing_from_elsewhere(path: str, client: TestClient) -> None:
    answer = client.get(path)
    allowed = policy(answer.headers)
    assert answer.headers.items() >= EVERYWHERE.items()
    assert allowed["default-src"] == ["'none'"]
    assert "'unsafe-inline'" not in allowed["script-src"]
    inline = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    assert len(inline) == (path == "/docs"), "the page's own scripts are files"
    for script in inline:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in allowed["script-src"]
    for source in re.findall(r'(?:src|href)="([^"]*)"', answer.text):
        assert not re.match(r"https?:|//", source), "nothing from elsewhere"
    assert not re.search(r"\son[a-z]+=|<[^>]*\sstyle=", answer.text), "the policy allows no handlers in attributes"


def test_an_edited_page_gets_the_hashes_of_its_new_scripts() -> None:
    old, new = (page_headers(f"<script>{text}</script>", allowed=()) for text in ("a()", "b()"))
    assert old != new


def test_the_parts_of_the_docs_are_there_and_may_be_kept(client: TestClient) -> None:
    html = client.get("/docs").text
    parts = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(parts) == 3
    for part in parts:
        answer = client.get(f"/{part}")
        assert answer.status_code == 200, part
        assert answer.headers["cache-control"] == "no-cache"
    assert "url: 'openapi.json'" in html or '"openapi.json"' in html


def test_the_page_asks_only_for_what_its_policy_allows() -> None:
    allowed = policy([(name.decode(), value.decode()) for name, value in page.headers()])
    assert allowed["connect-src"] == ["'self'"]
    assert allowed["script-src"] == allowed["style-src"] == ["'self'"]
    assert allowed["img-src"] == ["'self'", "blob:", "data:"]
