"""The page at /: classify a picture with every model, in the browser and through /v1."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse


def router() -> APIRouter:
    """The route of the page, which lies beside this file."""
    routes = APIRouter()
    text = Path(__file__).with_name("index.html").read_text(encoding="utf-8")

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text)

    return routes
