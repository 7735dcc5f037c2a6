"""Hints for what people try first: a name that is nearly right, a path of another server, a body in the wrong form.

Independent of any HTTP framework.
"""

import difflib
import re
from collections.abc import Iterable

_SHOWN = 40
"""How much of a client's own text an answer repeats, in characters."""
_PATH = 200
"""How much of a path is compared, in characters."""

PATHS = (
    "/",
    "/docs",
    "/healthz",
    "/metrics",
    "/openapi.json",
    "/readyz",
    "/v1/classify",
    "/v1/compare",
    "/v1/models",
    "/v1/status",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/stats",
    "/v2/repository/index",
)
"""Paths without a parameter, for a hint at the nearest one."""

_CLASSIFY = "to classify an image, send its bytes: POST /v1/classify"
_OFFERED = (
    (r"/v[12]/models/(?P<name>[\w.-]{1,40})(/versions/\d+)?[:/](predict|classify|infer|regress|explain|generate)",
     "to classify an image, POST /v1/classify?model={name}; for the Open Inference Protocol, POST "
     "/v2/models/{name}/infer"),
    (r"|(/api|/v1|/v2)?/(predict|predictions(/.*)?|classify|classification|infer|inference|invocations|score|run|"
     r"classify_image|image-classification|upload|models/[^/]+/invoke|pipeline/.*)", _CLASSIFY),
    (r"/(ping|health|healthcheck|health_check|live|livez|liveness|alive|status|up|-/healthy|health/live)",
     "whether the process answers: GET /healthz; whether models take traffic: GET /readyz"),
    (r"/(ready|readiness|startupz|-/ready|health/ready)", "whether models take traffic: GET /readyz"),
    (r"/v2/(health|live|ready)", "GET /v2/health/live or GET /v2/health/ready"),
    (r"(/api|/v1)?/(models?|labels|classes|models/[^/]+/labels)", "models and their labels: GET /v1/models and GET "
     "/v1/models/NAME"),
    (r"/v2/(models|repository)", "the models: POST /v2/repository/index, or GET /v1/models"),
    (r"/(prometheus|actuator/prometheus|stats|v1/metrics|v2/metrics)", "metrics for Prometheus: GET /metrics"),
    (r"/(swagger|swagger-ui(/.*)?|apidocs|api-docs|api|api/docs|redoc|help|docs/.*)", "the API is described at /docs"),
    (r"/(swagger\.(json|yaml)|openapi\.yaml|v[123]/(openapi\.json|api-docs))", "the API's description: GET "
     "/openapi.json"),
    (r"/v2/(system|cuda)sharedmemory(/.*)?",
     "shared memory is not offered: send tensors in the request's body (perf_analyzer: --shared-memory none)"),
    (r"/v2/(models/[^/]+/)?trace/setting", "settings of traces are not offered: see --otlp-endpoint of the service"),
    (r"/hf", "to classify an image as with Hugging Face's API, POST /hf/NAME"),
    (r"/(hf-inference/)?models/(?P<name>[\w.-]{1,40})(/pipeline/image-classification)?",
     "to classify an image as with Hugging Face's API, POST /hf/{name}; about a model: GET /v1/models/{name}"),
    (r"/v2/logging", "settings of logs are not offered: see --log-level of the service"),
)  # fmt: skip
_HINTS = tuple((re.compile(pattern, re.IGNORECASE), hint) for pattern, hint in _OFFERED)

_SIGNATURES = (
    (b"\x1f\x8b", "gzip data", "say so with the header `Content-Encoding: gzip`, or send the image itself"),
    (b"%PDF-", "a PDF document", "render the page to a PNG or JPEG first"),
    (b"PK\x03\x04", "a ZIP archive or an Office document", "unpack it and send each image"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "send the image itself, or use gzip with `Content-Encoding: gzip`"),
    (b"BZh", "bzip2 data", "send the image itself, or use gzip with `Content-Encoding: gzip`"),
    (b"\xfd7zXZ\x00", "xz data", "send the image itself, or use gzip with `Content-Encoding: gzip`"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and send each image"),
    (b"Rar!", "a RAR archive", "unpack it and send each image"),
    (b"\x93NUMPY", "a NumPy file", "encode the array as PNG, or send its pixels to /v2/models/NAME/infer"),
    (b"\x89PNG\n", "a PNG whose line ends were changed on the way", "with curl, use --data-binary, not -d"),
    (b"\x89PNG\r\n\n", "a PNG whose line ends were changed on the way", "with curl, use --data-binary, not -d"),
    (b"\x89PNG\x1a", "a PNG whose line ends were changed on the way", "with curl, use --data-binary, not -d"),
    (b"\xff\xd8\xff\xe0\x10JFIF", "a JPEG without its zero bytes", "with curl, use --data-binary, not -d"),
    (b"\xef\xbf\xbd", "binary data that was read as text", "read and send the file as bytes"),
    (b"\xc3\xbf\xc3\x98\xc3\xbf", "a JPEG that was encoded as UTF-8 text", "read and send the file as bytes"),
    (b"\xc2\x89PNG", "a PNG that was encoded as UTF-8 text", "read and send the file as bytes"),
)  # fmt: skip
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]+")
_BASE64 = re.compile(rb"(/9j/|iVBORw0KGgo|R0lGOD|Qk[0-2]|UklGR|SUkqA|TU0AK|AAAA)[A-Za-z0-9+/=\s_-]*")
_MARKUP = (
    (b"<!doctype html", "an HTML page", "its address may need a login, or be that of a page about the image"),
    (b"<html", "an HTML page", "its address may need a login, or be that of a page about the image"),
    (b"<svg", "an SVG drawing", "render it to a PNG first"),
    (b"<?xml", "XML, perhaps an SVG drawing", "render it to a PNG first"),
)
JSON_FORM = '{"image": "<base64>"}'
"""The shortest JSON body of /v1/classify."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """A sentence about a name that is not among the known ones: the nearest one, and all of them."""
    names = sorted(known)
    listed = f"; there are: {', '.join(names)}" if names else "; there are none"
    # difflib indexes the whole text, and a member of a JSON object may be as long as the body.
    short = name[:_PATH].lower().replace("-", "_")
    near = difflib.get_close_matches(short, names, n=1, cutoff=0.5)
    meant = f": did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {shown(name)!r}{meant}{listed}"


def for_path(path: str) -> str:
    """Where a request to a path that does not exist should go."""
    if hint := for_path_of_others(path):
        return hint
    near = difflib.get_close_matches(path[:_PATH].rstrip("/").lower(), PATHS, n=1, cutoff=0.75)
    return f"did you mean {near[0]}?" if near else "the API is described at /docs"


def for_path_of_others(path: str) -> str | None:
    """Where a request to another server's path should go; None if no such path is known here."""
    for pattern, hint in _HINTS:
        if found := pattern.fullmatch(path[:_PATH].rstrip("/")):
            return hint.format(**found.groupdict())
    return None


def for_body(body: bytes) -> str | None:
    """What a body that is surely not an image is, and what to send instead; None if it may be an image."""
    for signature, kind, advice in _SIGNATURES:
        if body.startswith(signature):
            return _sentence(kind, advice)
    start = body[:256].lstrip(b"\xef\xbb\xbf \t\r\n")
    lower = start.lower()
    for beginning, kind, advice in _MARKUP:
        if lower.startswith(beginning):
            return _sentence(kind, advice)
    if not start:
        return _sentence("white space", "send the bytes of an image") if body else None
    if not _TEXT.fullmatch(start):
        return None
    return _about_text(start, lower)


def is_url(text: bytes | str) -> bool:
    """Whether a text is the address of an image rather than an image."""
    start = text[:10].lower()
    schemes = ("http://", "https://", "ftp://", "file://", "s3://", "gs://")
    if isinstance(start, bytes):
        return start.startswith(tuple(scheme.encode() for scheme in schemes))
    return start.startswith(schemes)


NO_URL = "an image's address is not enough, since the service fetches nothing: download it and send its bytes"


def shown(text: str) -> str:
    """A client's own text, cut to a readable length."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _about_text(start: bytes, lower: bytes) -> str | None:
    if start.startswith((b"GIF8", b"RIFF")):
        # An image, cut before its first byte that is not text.
        return None
    if is_url(lower):
        return f"the body is a URL: {NO_URL}"
    text = shown(start.decode("ascii").splitlines()[0])
    kind, advice = f"text ({text!r})", "with curl, use --data-binary @photo.jpg to send a file's bytes"
    if start[:1] in b"{[":
        kind = "JSON"
        advice = f"send an image's bytes, or {JSON_FORM} as the whole body with `Content-Type: application/json`"
    elif lower.startswith(b"data:") or _BASE64.fullmatch(start):
        kind, advice = "an image as base64 text", f"send its bytes, or JSON: {JSON_FORM}"
    elif start.startswith(b"--") and b"content-disposition" in lower:
        kind = "a multipart form without its header"
        advice = "send the header `Content-Type: multipart/form-data; boundary=...`"
    elif re.match(rb"[\w.-]{1,40}=", start):
        kind, advice = "a URL-encoded form", "with curl, use -F image=@photo.jpg or --data-binary @photo.jpg"
    return _sentence(kind, advice)


def _sentence(kind: str, advice: str) -> str:
    return f"not an image but {kind}: {advice}"
