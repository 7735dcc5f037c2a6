"""The page at /: classify a picture with every model, in the browser and through /v1."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from service.http.security_headers import Headers, page_headers

PATH = "/"


def router() -> APIRouter:
    """The route of the page, which lies beside this file."""
    routes = APIRouter()
    text = _html()

    @routes.get(PATH, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text)

    return routes


def headers() -> Headers:
    """What a browser may do with it: call the service, and show the picture that was chosen."""
    return page_headers(_html(), allowed=("connect-src 'self'", "img-src blob: data:"))


def _html() -> str:
    return Path(__file__).with_name("index.html").read_text(encoding="utf-8")
