"""/docs: the API as a page, which loads nothing from elsewhere."""

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

from service.http.security_headers import Headers, page_headers

PATH = "/docs"
PARTS = "/static-offline-docs"
"""Where `fastapi_offline` serves the script and the style of the page."""


class DocsPage:
    """The page, the same for everybody: its links are relative, so that it works behind any prefix of a proxy."""

    def __init__(self, title: str) -> None:
        parts = PARTS.removeprefix("/")
        page = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"{title}: API",
            swagger_js_url=f"{parts}/swagger-ui-bundle.js",
            swagger_css_url=f"{parts}/swagger-ui.css",
            swagger_favicon_url=f"{parts}/favicon.png",
        )
        self._html = bytes(page.body).decode()

    @property
    def headers(self) -> Headers:
        """What a browser may do with it: Swagger UI sets styles, and shows answers that are pictures."""
        return page_headers(
            self._html,
            scripts=("'self'",),
            styles=("'self'", "'unsafe-inline'"),
            allowed=("img-src 'self' data: blob:", "connect-src 'self'"),
        )

    def router(self) -> APIRouter:
        """Its route."""
        routes = APIRouter()

        @routes.get(PATH, include_in_schema=False)
        async def docs() -> HTMLResponse:
            return HTMLResponse(self._html)

        return routes
