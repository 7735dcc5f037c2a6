"""API keys: which are accepted, their limits, and their file."""

import hashlib
import os
import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import KeyLimited, StartupError
from service.key_file import MAX_BYTES, KeyFile, entries_of_settings, read_keys
from service.keys import KeyEntry, KeyRing, Usage, new_key
from service.settings import Settings
from tests.processes import PATIENCE_SECONDS, get, serving, wait_until
from tests.service.conftest import Clock
from tests.service.identity import publish_identity


def sha256sum(key: str) -> str:
    """As `sha256sum` would."""
    return hashlib.sha256(key.encode()).hexdigest()


def entry(name: str, key: str = "", **values: object) -> KeyEntry:
    return KeyEntry.model_validate({"name": name, "sha256": sha256sum(key or name), "scopes": ["classify"], **values})


def ring_of(keys: list[str]) -> KeyRing:
    return KeyRing(entries_of_settings([sha256sum(key) for key in keys], None))


def written(path: Path, *entries: KeyEntry) -> Path:
    """Put a file of keys in its place at once, as an editor or Kubernetes does."""
    new = path.with_suffix(".new")
    new.write_text("".join(one.as_toml() for one in entries))
    new.replace(path)
    return path


@settings(max_examples=50)
@given(st.lists(st.text(), max_size=5, unique=True), st.text(st.characters()))
def test_exactly_the_keys_whose_hashes_are_known_are_accepted(keys: list[str], other: str) -> None:
    """`other` may hold lone surrogates, which UTF-8 cannot."""
    ring = ring_of(keys)
    assert all(ring.find(key) for key in keys)
    assert bool(ring.find(other)) == (other in keys)


def test_a_new_key_opens_the_ring_made_of_its_hash_and_no_other_does() -> None:
    key, digest = new_key()
    other, _ = new_key()
    ring = KeyRing(entries_of_settings(Settings(api_key_hashes=(digest,)).api_key_hashes, None))
    assert ring.find(key)
    assert not ring.find(other)
    assert not ring.find(digest)


def test_new_keys_differ_and_hold_256_bits() -> None:
    keys = {new_key()[0] for _ in range(100)}
    assert len(keys) == 100
    assert min(map(len, keys)) >= 43  # 32 bytes in base64


def test_an_empty_ring_accepts_nothing() -> None:
    assert not KeyRing().find("")


def test_the_keys_of_the_settings_get_names_and_the_admin_key_all_scopes() -> None:
    entries = entries_of_settings([sha256sum("a"), sha256sum("b"), sha256sum("a")], sha256sum("c"))
    assert [(one.name, sorted(one.scopes)) for one in entries] == [
        ("key-1", ["classify", "read"]),
        ("key-2", ["classify", "read"]),
        ("admin", ["admin", "classify", "read"]),
    ]
    assert KeyRing(entries).keys[2].name == "admin"


def test_neither_a_ring_nor_an_entry_shows_hashes() -> None:
    ring = ring_of(["a"])
    shown = f"{ring!r} {ring.keys!r} {ring.keys[0].entry!r}"
    assert sha256sum("a") not in shown
    assert repr(bytes.fromhex(sha256sum("a"))) not in shown


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("a"), entry("a", "b")], "two keys have the name 'a'"),
        ([entry("a", "x"), entry("b", "x")], "'a' and 'b' are the same key"),
    ],
)
def test_names_and_keys_are_unique(entries: list[KeyEntry], message: str) -> None:
    ring = KeyRing([entry("old")])
    with pytest.raises(ValueError, match=message):
        ring.replace(entries)
    assert [key.name for key in ring.keys] == ["old"]


def test_requests_beyond_the_rate_are_refused_until_the_time_that_the_error_says() -> None:
    clock = Clock()
    usage, limited = Usage(clock), entry("a", requests_per_second=2, burst=3)
    for _ in range(3):
        usage.end(usage.begin(limited))
    with pytest.raises(KeyLimited) as refused:
        usage.begin(limited)
    assert (refused.value.reason, refused.value.retry_after_s) == ("key-rate", 0.5)
    clock.now += 0.49
    with pytest.raises(KeyLimited):
        usage.begin(limited)
    clock.now += 0.01
    usage.end(usage.begin(limited))
    clock.now += 1000
    for _ in range(3):
        usage.end(usage.begin(limited))
    with pytest.raises(KeyLimited):
        usage.begin(limited)


def test_requests_at_once_are_limited_and_a_place_is_free_when_one_ends() -> None:
    clock = Clock()
    usage, limited = Usage(clock), entry("a", max_concurrent=2)
    first, _ = usage.begin(limited), usage.begin(limited)
    with pytest.raises(KeyLimited) as refused:
        usage.begin(limited)
    assert refused.value.reason == "key-concurrency"
    clock.now += 0.2
    usage.end(first)
    third = usage.begin(limited)
    with pytest.raises(KeyLimited) as refused:
        usage.begin(limited)
    assert refused.value.retry_after_s == pytest.approx(0.1), "two of 0.2 s each: one ends every 0.1 s"
    usage.end(third)
    assert usage.in_work == 1


def test_a_request_beyond_the_requests_at_once_costs_nothing_of_the_rate() -> None:
    clock = Clock()
    usage, limited = Usage(clock), entry("a", max_concurrent=1, requests_per_second=1, burst=2)
    first = usage.begin(limited)
    for _ in range(5):
        with pytest.raises(KeyLimited):
            usage.begin(limited)
    usage.end(first)
    usage.begin(limited)


def test_a_reload_resets_no_limit() -> None:
    clock = Clock()
    ring = KeyRing([entry("a", requests_per_second=1, max_concurrent=5)], clock=clock)
    old = ring.find("a")
    assert old
    started = old.usage.begin(old.entry)
    ring.replace([entry("a", "rotated", requests_per_second=1, max_concurrent=5), entry("b")])
    assert not ring.find("a")
    new = ring.find("rotated")
    assert new
    assert new.usage.in_work == 1
    with pytest.raises(KeyLimited):
        new.usage.begin(new.entry)
    old.usage.end(started)
    assert new.usage.in_work == 0


def test_an_entry_is_read_as_it_was_written(tmp_path: Path) -> None:
    entries = (
        entry("alice", scopes=["read", "classify"], requests_per_second=0.5, burst=4, max_concurrent=2),
        entry("bob@example.com", expires=datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)),
    )
    assert read_keys(written(tmp_path / "keys.toml", *entries))[0] == entries


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys = 1", "keys: Input should be a valid tuple"),
        ("[[keys]", "Expected"),
        ("[[key]]", "key: Extra inputs are not permitted"),
        ('[[keys]]\nname = "a"', "keys.0.sha256: Field required"),
        ('[[keys]]\nname = "a"\nsha256 = "my-secret"\nscopes = ["read"]', "must be 64 hexadecimal digits"),
        (entry("a").as_toml() + "scope = 1", "keys.0.scope: Extra inputs"),
        (entry("a").as_toml().replace("classify", "all"), "keys.0.scopes.0: Input should be 'classify'"),
        (entry("a").as_toml().replace('["classify"]', "[]"), "keys.0.scopes: "),
        (entry("a").as_toml() + "burst = 1", "burst needs requests_per_second"),
        (entry("a").as_toml() + "requests_per_second = 0", "keys.0.requests_per_second: "),
        (entry("a").as_toml() + "requests_per_second = nan", "keys.0.requests_per_second: "),
        (entry("a").as_toml() + "expires = 2030-01-01", "keys.0.expires: "),
        (entry("a").as_toml().replace('"a"', '"a b"'), "keys.0.name: String should match"),
        ("#" * (MAX_BYTES + 1), "exceeds"),
    ],
)
def test_a_file_that_is_not_one_of_keys_is_an_error_that_shows_no_secret(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(StartupError) as raised:
        KeyFile(path, KeyRing(), fixed=(), poll_seconds=0)
    assert message in str(raised.value)
    assert "keys.toml" in str(raised.value)
    assert "my-secret" not in str(raised.value)


def test_a_file_that_is_missing_or_a_pipe_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("missing", "No such file"), ("pipe", "not a regular file")):
        with pytest.raises(StartupError, match=message):
            KeyFile(tmp_path / name, KeyRing(), fixed=(), poll_seconds=0)


def names(ring: KeyRing) -> list[str]:
    return [key.name for key in ring.keys]


def test_a_changed_file_replaces_the_keys_of_the_old_one_and_keeps_those_of_the_settings(tmp_path: Path) -> None:
    ring, path = KeyRing(), written(tmp_path / "keys.toml", entry("a"))
    file = KeyFile(path, ring, fixed=[entry("key-1")], poll_seconds=0)
    assert names(ring) == ["key-1", "a"]
    written(path, entry("a"), entry("b"))
    file.refresh(asked=False)
    assert names(ring) == ["key-1", "a", "b"]
    written(path, entry("b"))
    file.refresh(asked=False)
    assert names(ring) == ["key-1", "b"]


def test_a_file_is_read_only_when_it_changed_or_somebody_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "keys.toml", entry("a"))
    file = KeyFile(path, KeyRing(), fixed=(), poll_seconds=0)
    with structlog.testing.capture_logs() as lines:
        file.refresh(asked=False)
        assert lines == []
        file.refresh(asked=True)
        assert [line["event"] for line in lines] == ["keys read"]


@pytest.mark.parametrize("broken", ["[[keys]", entry("a").as_toml() * 2, None])
def test_a_broken_file_keeps_the_old_keys_says_so_once_and_is_taken_once_it_is_whole(
    broken: str | None, tmp_path: Path
) -> None:
    ring, path = KeyRing(), written(tmp_path / "keys.toml", entry("a"))
    file = KeyFile(path, ring, fixed=(), poll_seconds=0)
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            file.refresh(asked=False)
    assert [line["log_level"] for line in lines] == ["error"]
    assert "the old keys stay" in lines[0]["event"]
    assert names(ring) == ["a"]
    written(path, entry("b"))
    file.refresh(asked=False)
    assert names(ring) == ["b"]


@pytest.mark.parametrize("by", ["polling", "SIGHUP"])
def test_keys_are_rotated_while_the_service_runs(by: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    publish_identity(tmp_path / "models")
    path = written(tmp_path / "keys.toml", entry("a"))
    environment = {
        "STRIDEVIT_KEYS_FILE": str(path),
        "STRIDEVIT_KEYS_POLL_SECONDS": "0.05" if by == "polling" else "0",
    }

    def status(key: str) -> int:
        return get(url + "/v1/models", headers={"X-API-Key": key}).status_code

    with serving(tmp_path / "models", environment=environment) as (url, process):
        assert (status("a"), status("b")) == (200, 401)
        path.write_text("broken")
        if by == "SIGHUP":
            process.send_signal(signal.SIGHUP)
        written(path, entry("b"))
        if by == "SIGHUP":
            process.send_signal(signal.SIGHUP)
        wait_until(lambda: status("b") == 200, process)
        assert status("a") == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
