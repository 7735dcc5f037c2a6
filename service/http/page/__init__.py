"""The page at /: one picture through every model, what each answers and what that costs, in the browser over /v1.

Plain ES modules, styles and pictures are next to this file. They are read once at start and served from memory.
"""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from service.http.compression import accepts_gzip
from service.http.security_headers import Headers, page_headers

PATH = "/"
PARTS = "/page"
"""Where the scripts, styles and pictures of the page are; relative to it, so that it works behind any proxy prefix."""

_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}
_INDEX: Final = "index.html"


@dataclass(frozen=True)
class File:
    """A file of the page, ready to be sent."""

    body: bytes
    media_type: str
    etag: str
    gzipped: bytes | None
    """None for pictures, which are compressed already."""


def read_files() -> dict[str, File]:
    """All files of the page that browsers load, by their path relative to this folder."""
    folder = Path(__file__).parent
    return {
        path.relative_to(folder).as_posix(): _file(path.read_bytes(), _TYPES[path.suffix])
        for path in sorted(folder.rglob("*"))
        if path.suffix in _TYPES
    }


def router() -> APIRouter:
    """The routes of the page and its parts. Paths of requests are looked up among the files read at start."""
    routes, files = APIRouter(), read_files()

    @routes.get(PATH, include_in_schema=False)
    async def page(request: Request) -> Response:
        return _answer(request, files[_INDEX])

    @routes.get(PARTS + "/{name:path}", include_in_schema=False)
    async def part(request: Request, name: str) -> Response:
        found = files.get(name)
        if found is None:
            raise HTTPException(404)
        return _answer(request, found)

    return routes


def headers() -> Headers:
    """What a browser may do with it: run its own scripts, call the service, and show pictures."""
    return page_headers(
        "",
        scripts=("'self'",),
        styles=("'self'",),
        allowed=("connect-src 'self'", "img-src 'self' blob: data:"),
    )


def _file(body: bytes, media_type: str) -> File:
    return File(
        body=body,
        media_type=media_type,
        etag=hashlib.sha256(body).hexdigest()[:32],
        gzipped=None if media_type == "image/jpeg" else gzip.compress(body, mtime=0),
    )


def _answer(request: Request, file: File) -> Response:
    packed = file.gzipped is not None and accepts_gzip(request.headers.get("accept-encoding"))
    etag = f'"{file.etag}-gzip"' if packed else f'"{file.etag}"'
    headers = {"ETag": etag, "Vary": "Accept-Encoding"}
    # A weak tag comes from a proxy that compressed the file itself: it is the same file all the same.
    offered = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if etag in offered:
        return Response(status_code=304, headers=headers)
    if packed:
        headers["Content-Encoding"] = "gzip"
    return Response(file.gzipped if packed else file.body, media_type=file.media_type, headers=headers)
