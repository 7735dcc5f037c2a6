"""A repository on a web server with TLS."""

import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

import pytest
import trustme

from service.bundle import MAX_FILE_BYTES
from service.errors import RepositoryError
from service.remote import mirror as mirror_module
from service.remote.address import parse_address
from service.remote.mirror import Mirror
from service.remote.web import WebStore
from service.remote.web_index import INDEX_FILE, parse_index, write_index
from tests.service.remote.conftest import World, bundle_files, contents

Fault = Callable[["_Handler"], None]


@dataclass
class Site:
    """A folder on a web server, and what it was asked for."""

    folder: Path
    url: str = ""
    faults: dict[str, Fault] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)
    authorizations: set[str] = field(default_factory=set)

    def put(self, key: str, content: bytes = b"graph") -> None:
        folder = self.folder / key
        folder.mkdir(parents=True, exist_ok=True)
        for file, data in bundle_files(content).items():
            (folder / file).write_bytes(data)
        write_index(self.folder)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        self.site.authorizations.add(self.headers.get("Authorization", ""))
        fault = next((fault for end, fault in self.site.faults.items() if path.endswith(end)), None)
        if fault:
            fault(self)
            return
        file = self.site.folder / path
        content = file.read_bytes() if file.is_file() else b""
        tag = f'"{hash(content)}"'
        if not file.is_file():
            self.reply(HTTPStatus.NOT_FOUND)
        elif self.headers.get("If-None-Match") == tag:
            self.reply(HTTPStatus.NOT_MODIFIED)
        else:
            self.reply(HTTPStatus.OK, content, ETag=tag)

    def reply(self, status: HTTPStatus, content: bytes = b"", *, length: int | None = None, **headers: str) -> None:
        self.site.asked.append((self.path, int(status)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = length is not None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def site(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    served = Site(tmp_path / "site")
    served.folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": served}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setenv("NO_PROXY", "*")
    served.url = f"https://127.0.0.1:{server.server_port}"
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def mirror(site: Site, world: World, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    monkeypatch.setattr(mirror_module, "_READ_PAUSE_SECONDS", 0)
    return mirror_of(site.url, world)


def mirror_of(url: str, world: World) -> Mirror:
    return world.mirror(url, store=WebStore(parse_address(url), timeout_seconds=60))


def test_bundles_are_copied_and_an_unchanged_index_is_not_sent_again(site: Site, mirror: Mirror) -> None:
    site.put("a/1", b"1")
    assert mirror.update() == {}
    assert contents(mirror.folder) == {"a/1": bundle_files(b"1")}
    site.asked.clear()
    assert mirror.update() == {}
    assert site.asked == [("/index.json", 304)]
    site.put("a/2", b"2")
    assert mirror.update() == {}
    assert sorted(contents(mirror.folder)) == ["a/1", "a/2"]


def test_a_wrong_digest_names_the_file_and_leaves_the_old_version(site: Site, mirror: Mirror) -> None:
    site.put("a/1", b"1")
    mirror.update()
    before = contents(mirror.folder)
    site.put("a/2", b"2")
    (site.folder / "a/2/labels.txt").write_bytes(b"wrong")
    assert "a/2/labels.txt: sha256 is" in mirror.update({("a", 1)})["a", 2]
    (site.folder / "a/2/SHA256SUMS").write_bytes(bundle_files(b"3")["SHA256SUMS"])
    assert "but the index says" in mirror.update({("a", 1)}, force=True)["a", 2]
    assert contents(mirror.folder) == before


def test_a_file_that_is_cut_short_or_missing_is_named(site: Site, mirror: Mirror) -> None:
    site.put("a/1", b"1")
    site.put("b/1", b"2")
    site.put("c/1", b"3")
    site.faults["a/1/model.onnx"] = lambda handler: handler.reply(HTTPStatus.OK, b"12345", length=1000)
    (site.folder / "b/1/golden.npz").unlink()
    missing = mirror.update()
    assert missing["a", 1] == "a/1/model.onnx: the connection ended before the file did"
    assert missing["b", 1].startswith("b/1/golden.npz: there is none (404)")
    assert sorted(contents(mirror.folder)) == ["c/1"]


def test_a_file_without_an_end_is_given_up(site: Site, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    site.put("a/1", b"x" * 1000)
    monkeypatch.setitem(MAX_FILE_BYTES, "labels.txt", 500)
    assert "a/1/labels.txt: exceeds 500 bytes" in mirror.update()["a", 1]


@pytest.mark.parametrize("target", ["http://127.0.0.1:1/x", "file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_redirects_lead_only_to_https(target: str, site: Site, mirror: Mirror) -> None:
    site.put("a/1")
    site.faults["a/1/model.onnx"] = lambda handler: handler.reply(HTTPStatus.FOUND, Location=target)
    (reason,) = mirror.update().values()
    assert reason == "a/1/model.onnx: is redirected to an address that is not https://"
    assert contents(mirror.folder) == {}


def test_a_redirect_to_https_is_followed_and_one_without_end_is_not(site: Site, mirror: Mirror) -> None:
    site.put("a/1")
    (site.folder / "elsewhere").write_bytes(bundle_files()["model.onnx"])
    site.faults["a/1/model.onnx"] = lambda handler: handler.reply(HTTPStatus.FOUND, Location="/elsewhere")
    site.faults["a/1/labels.txt"] = lambda handler: handler.reply(HTTPStatus.FOUND, Location="labels.txt")
    assert "labels.txt: is redirected more than 5 times" in mirror.update()["a", 1]
    del site.faults["a/1/labels.txt"]
    assert mirror.update(force=True) == {}


def test_credentials_are_sent_to_the_server_and_shown_nowhere(
    site: Site, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    site.put("a/1")
    site.faults["labels.txt"] = lambda handler: handler.reply(HTTPStatus.FORBIDDEN)
    mirror = mirror_of(site.url.replace("://", "://me:sesame@"), world)
    (reason,) = mirror.update().values()
    assert "access denied (403)" in reason
    site.faults["index.json"] = lambda handler: handler.reply(HTTPStatus.UNAUTHORIZED)
    with pytest.raises(RepositoryError, match="access denied") as caught:
        mirror.update()
    assert site.authorizations == {"Basic bWU6c2VzYW1l"}
    written = capsys.readouterr()
    assert "sesame" not in reason + str(caught.value) + written.out + written.err
    assert "bWU6c2VzYW1l" not in written.out + written.err


def test_credentials_do_not_follow_a_redirect_to_another_host(site: Site, world: World) -> None:
    site.put("a/1")
    (site.folder / "elsewhere").write_bytes(bundle_files()["model.onnx"])
    seen: list[str | None] = []
    target = site.url.replace("127.0.0.1", "localhost") + "/elsewhere"
    site.faults["model.onnx"] = lambda handler: handler.reply(HTTPStatus.FOUND, Location=target)

    def elsewhere(handler: _Handler) -> None:
        seen.append(handler.headers.get("Authorization"))
        handler.reply(HTTPStatus.OK, (site.folder / "elsewhere").read_bytes())

    site.faults["elsewhere"] = elsewhere
    assert mirror_of(site.url.replace("://", "://me:sesame@"), world).update() == {}
    assert seen == [None]


def test_a_server_of_another_authority_is_refused(site: Site, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    site.put("a/1")
    with pytest.raises(RepositoryError, match="CERTIFICATE_VERIFY_FAILED"):
        mirror.update()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is none"),
        (b"<html>", "Invalid JSON"),
        (b'{"schema_version": 2, "models": {}}', "schema_version"),
        (b'{"schema_version": 1, "models": {}}', "lists no bundle"),
        (b'{"schema_version": 1, "models": {"a": {"1": "x"}}}', "models.a.1"),
        (b'{"schema_version": 1, "models": {"../a": {"1": "%s"}}}' % (b"0" * 64), "not the name of a bundle"),
        (b'{"schema_version": 1, "models": {"a": {"../1": "%s"}}}' % (b"0" * 64), "not the name of a bundle"),
        (b" " * (8 * 1024 * 1024 + 1), "exceeds 8388608 bytes"),
    ],
)
def test_an_index_that_is_none_is_refused_in_one_line(
    text: bytes | None, message: str, site: Site, mirror: Mirror
) -> None:
    if text is not None:
        (site.folder / INDEX_FILE).write_bytes(text)
    with pytest.raises(RepositoryError, match=message) as caught:
        mirror.update()
    assert "\n" not in str(caught.value)
    assert contents(mirror.folder) == {}


def test_an_index_holds_what_the_folder_holds(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.put("a/1", b"1")
    site.put("a/2", b"2")
    site.put("b/7", b"3")
    assert write_index(tmp_path) == 3
    assert sorted(parse_index((tmp_path / INDEX_FILE).read_bytes())) == [("a", 1), ("a", 2), ("b", 7)]
    assert [path.name for path in tmp_path.glob(".index*")] == []
