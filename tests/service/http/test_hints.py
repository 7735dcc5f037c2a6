"""Hints: what is said about a body that is no image, a path that does not exist, and a name that is nearly right."""

import base64
import difflib
import gzip
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.http import hints
from tests.service.conftest import PNG, encoded, noise


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (gzip.compress(b"x", mtime=0), "gzip data: say so with the header `Content-Encoding: gzip`"),
        (b"%PDF-1.7", "a PDF document"),
        (b"PK\x03\x04...", "a ZIP archive"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"  <html>", "an HTML page"),
        (b'<?xml version="1.0"?><svg/>', "an SVG drawing"),
        (b"<svg xmlns=", "an SVG drawing: render it"),
        (b"\xef\xbb\xbf<svg xmlns=", "an SVG drawing: render it"),
        (b"https://example.com/cat.jpg", "the service fetches nothing"),
        (b"data:image/png;base64,iVBORw0KGgo=", "an image as base64 text"),
        (base64.b64encode(PNG), "an image as base64 text"),
        (base64.encodebytes(encoded(noise(), "JPEG")), "an image as base64 text"),
        (b'{"image": 1}', "JSON: send an image's bytes, or"),
        (b"image=abc&top_k=1", "a URL-encoded form"),
        (b'--b\r\nContent-Disposition: form-data; name="image"', "a multipart form without its header"),
        (b"photo.jpg", "text ('photo.jpg'): with curl, use --data-binary"),
        (b" \n", "white space"),
        (PNG.replace(b"\r\n", b"\n", 1), "a PNG whose line ends were changed"),
        (PNG.replace(b"\r", b"").replace(b"\n", b""), "a PNG whose line ends were changed"),
        (encoded(noise(), "JPEG").replace(b"\0", b""), "a JPEG without its zero bytes"),
        (PNG.decode("utf-8", "replace").encode(), "binary data that was read as text"),
        (encoded(noise(), "JPEG").decode("latin-1").encode(), "a JPEG that was encoded as UTF-8 text"),
        (b"\x93NUMPY\x01", "a NumPy file"),
    ],
)
def test_a_body_that_is_no_image_is_named(body: bytes, said: str) -> None:
    assert said in (hints.for_body(body) or "")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"])
def test_an_image_is_never_taken_for_something_else(kind: str) -> None:
    image = encoded(noise(), kind)
    for size in range(1, len(image)):
        assert hints.for_body(image[:size]) is None or size < 4


def test_odd_image_files_are_not_taken_for_something_else(data_dir: Path) -> None:
    for file in (data_dir / "photos").glob("*.jpg"):
        assert hints.for_body(file.read_bytes()) is None, file.name


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/predict", "POST /v1/classify"),
        ("/predictions/resnet", "POST /v1/classify"),
        ("/v1/predict", "POST /v1/classify"),
        ("/invocations", "POST /v1/classify"),
        (
            "/v1/models/a-b:predict",
            "POST /v1/classify?model=a-b; for the Open Inference Protocol, POST /v2/models/a-b/",
        ),
        ("/v2/models/a/predict", "/v2/models/a/infer"),
        ("/health", "GET /healthz"),
        ("/PING/", "GET /healthz"),
        ("/ready", "GET /readyz"),
        ("/models", "GET /v1/models"),
        ("/models/a-b", "POST /hf/a-b"),
        ("/hf/", "POST /hf/NAME"),
        ("/v2/models", "POST /v2/repository/index"),
        ("/swagger", "/docs"),
        ("/swagger.json", "/openapi.json"),
        ("/v2/systemsharedmemory/region/x/register", "shared memory is not offered"),
        ("/v2/cudasharedmemory/status", "shared memory is not offered"),
        ("/v1/clasify", "did you mean /v1/classify?"),
        ("/v1/classify/now", "did you mean /v1/classify?"),
        ("/helthz", "did you mean /healthz?"),
        ("/wp-login.php", "the API is described at /docs"),
        ("/" + "a" * 100_000, "the API is described at /docs"),
    ],
)
def test_a_path_that_does_not_exist_is_told_where_to_go(path: str, hint: str) -> None:
    assert hint in hints.for_path(path)


def test_hints_lead_to_paths_that_exist(client: TestClient) -> None:
    described = client.get("/openapi.json").json()["paths"]
    for path in hints.PATHS:
        assert path in described or client.get(path).status_code == 200, path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("topk", "did you mean 'top_k'?"),
        ("TOP-K", "did you mean 'top_k'?"),
        ("deadline", "did you mean 'deadline_ms'?"),
        ("threshold", "'threshold'; there are: deadline_ms, top_k"),
        ("x" * 1000, "xxx...'"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(name: str, said: str) -> None:
    sentence = hints.unknown_name("query parameter", name, ["top_k", "deadline_ms"])
    assert said in sentence
    assert len(sentence) < 150


def test_of_a_very_long_name_only_the_beginning_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    real = difflib.get_close_matches

    def get_close_matches(word: str, *arguments: Any, **options: Any) -> list[str]:
        compared.append(word)
        return list(real(word, *arguments, **options))

    monkeypatch.setattr(difflib, "get_close_matches", get_close_matches)
    assert "did you mean 'top_k'?" in hints.unknown_name("JSON member", "topk", ("top_k", "model"))
    assert len(hints.unknown_name("JSON member", "x" * 4_000_000, ("top_k", "model"))) < 1000
    assert max(map(len, compared)) <= 1000
