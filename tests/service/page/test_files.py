"""How the page's files are served. Needs no browser."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service.http import page
from tests.processes import ROOT

FOLDER = ROOT / "service" / "http" / "page"
FILES = page.read_files()


def test_every_file_that_a_browser_loads_is_served_with_its_type(client: TestClient) -> None:
    types = {
        "js": "text/javascript",
        "css": "text/css",
        "svg": "image/svg+xml",
        "jpg": "image/jpeg",
        "html": "text/html",
    }
    assert len(FILES) > 20
    for name, file in FILES.items():
        answer = client.get(f"/page/{name}")
        assert answer.status_code == 200
        assert answer.content == file.body == (FOLDER / name).read_bytes()
        assert answer.headers["content-type"].startswith(types[name.rpartition(".")[2]])
        assert answer.headers["cache-control"] == "no-cache"


def test_what_the_modules_and_the_page_name_is_there() -> None:
    for name, file in FILES.items():
        text = file.body.decode("utf-8", "replace") if not name.endswith(".jpg") else ""
        base = FOLDER / Path(name).parent if name.endswith(".js") else FOLDER.parent
        pattern = r'(?:from|import\()\s*"(\.[^"]+)"' if name.endswith(".js") else r'(?:src|href)="(page/[^"]+)"'
        for named in re.findall(pattern, re.sub(r"^\s*(/\*\*.*|//.*)$", "", text, flags=re.MULTILINE)):
            assert (base / named).resolve().is_file(), f"{name} names {named}"


@pytest.mark.parametrize(
    "path",
    [
        "/page/__init__.py",
        "/page/vendor/vendored.json",
        "/page/../v1.py",
        "/page/%2e%2e/v1.py",
        "/page//etc/passwd",
        "/page/",
    ],
)
def test_nothing_else_is_served(path: str, client: TestClient) -> None:
    assert client.get(path).status_code == 404


def test_a_file_is_compressed_for_those_who_take_it(client: TestClient) -> None:
    packed = client.get("/page/main.js", headers={"Accept-Encoding": "br, gzip"})
    plain = client.get("/page/main.js", headers={"Accept-Encoding": "identity"})
    refused = client.get("/page/main.js", headers={"Accept-Encoding": "gzip;q=0, br"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert "content-encoding" not in refused.headers
    assert packed.content == plain.content == refused.content
    assert packed.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"
    assert packed.headers["etag"] != plain.headers["etag"], "two representations"
    assert "content-encoding" not in client.get("/page/samples/rocket.jpg", headers={"Accept-Encoding": "gzip"}).headers


def test_a_file_that_is_known_is_not_sent_again(client: TestClient) -> None:
    for path in ("/", "/page/main.js", "/page/samples/rocket.jpg"):
        first = client.get(path)
        for offered in (first.headers["etag"], f'"x", W/{first.headers["etag"]}'):
            again = client.get(path, headers={"If-None-Match": offered})
            assert again.status_code == 304
            assert again.content == b""
            assert again.headers["etag"] == first.headers["etag"]
            assert again.headers["x-content-type-options"] == "nosniff"
        assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")


def test_the_page_is_small() -> None:
    sent = sum(len(file.gzipped or file.body) for name, file in FILES.items() if not name.startswith("samples/"))
    assert sent <= 130_000, f"{sent:,} bytes"
    samples = {name: len(file.body) for name, file in FILES.items() if name.startswith("samples/")}
    assert len(samples) == 3
    assert max(samples.values()) <= 40_000
    for name in samples:
        with Image.open(FOLDER / name) as picture:
            assert picture.format == "JPEG"
        assert f"`{Path(name).name}`" in (FOLDER / "samples" / "README.md").read_text(encoding="utf-8"), "its licence"


def test_modules_stay_short() -> None:
    ours = [name for name in FILES if not name.startswith(("vendor/", "samples/"))]
    assert {name: lines for name in ours if (lines := FILES[name].body.count(b"\n")) > 300} == {}


def test_the_library_is_the_one_that_was_vendored() -> None:
    facts = json.loads((FOLDER / "vendor" / "vendored.json").read_text(encoding="utf-8"))
    lock = json.loads((ROOT / "lock" / "page" / "package-lock.json").read_text(encoding="utf-8"))
    locked = lock["packages"]["node_modules/uplot"]
    assert (facts["version"], facts["npm_integrity"]) == (locked["version"], locked["integrity"]), (
        "renew it: make vendor"
    )
    for name, digest in facts["sha256"].items():
        assert hashlib.sha256((FOLDER / "vendor" / name).read_bytes()).hexdigest() == digest
    assert "The MIT License" in (FOLDER / "vendor" / "uPlot.LICENSE").read_text(encoding="utf-8")


def test_addresses_are_relative() -> None:
    """Under a prefix of a proxy an absolute path leads elsewhere."""
    html = FILES["index.html"].body.decode()
    assert not re.findall(r'(?:src|href)="(?:/|https?:)[^"]*"', html)
    for name, file in FILES.items():
        if name.endswith(".js") and not name.startswith("vendor/"):
            assert not re.search(r'["`]/(v1|page)\b|https?://(?!www\.w3\.org)', file.body.decode()), name


def test_what_is_sent_compressed_is_the_file() -> None:
    for file in FILES.values():
        assert file.gzipped is None or gzip.decompress(file.gzipped) == file.body
