"""API keys and the admin key, and which web pages may call the service."""

import hashlib
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from service.app import create_app
from service.http.auth import KeyRing, new_key
from service.settings import Settings
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


def sha256sum(key: str) -> str:
    """As `sha256sum` would."""
    return hashlib.sha256(key.encode()).hexdigest()


@settings(max_examples=50)
@given(st.lists(st.text(), max_size=5), st.text(st.characters()))
def test_exactly_the_keys_whose_hashes_are_known_are_accepted(keys: list[str], other: str) -> None:
    """`other` may hold lone surrogates, which UTF-8 cannot."""
    ring = KeyRing([sha256sum(key) for key in keys])
    assert all(ring.accepts(key) for key in keys)
    assert ring.accepts(other) == (other in keys)


def test_a_new_key_opens_the_ring_made_of_its_hash_and_no_other_does() -> None:
    key, digest = new_key()
    other, _ = new_key()
    ring = KeyRing(Settings(api_key_hashes=(digest,)).api_key_hashes)
    assert ring.accepts(key)
    assert not ring.accepts(other)
    assert not ring.accepts(digest)


def test_new_keys_differ_and_hold_256_bits() -> None:
    keys = {new_key()[0] for _ in range(100)}
    assert len(keys) == 100
    assert min(map(len, keys)) >= 43  # 32 bytes in base64


def test_an_empty_ring_accepts_nothing() -> None:
    assert not KeyRing(()).accepts("")


def test_every_hash_is_compared_wherever_the_right_one_stands() -> None:
    keys = ["first", "second", "third"]
    ring = KeyRing([sha256sum(key) for key in keys])
    assert [ring.accepts(key) for key in keys] == [True, True, True]


def test_a_ring_does_not_show_its_hashes() -> None:
    digest = new_key()[1]
    assert digest not in repr(KeyRing([digest]))
