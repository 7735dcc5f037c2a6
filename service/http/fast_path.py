"""Routes that FastAPI documents and does not serve: its layers cost more than a small model's batch."""

from collections.abc import Iterable

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import RequestError
from service.http.problems import error_response


class FastRoute(APIRoute):
    """Marks a route whose endpoint takes the request and returns the response; `openapi_extra` describes the rest."""


class FastPath:
    """ASGI middleware: calls the endpoints of fast routes directly."""

    def __init__(self, app: ASGIApp, *, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes = [route for route in routes if isinstance(route, FastRoute)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            for route in self._routes:
                match, found = route.matches(scope)
                if match is Match.FULL:
                    scope.update(found)
                    request = Request(scope, receive, send)
                    try:
                        response = await route.endpoint(request)
                    except RequestError as error:
                        response = error_response(request, error)
                    await response(scope, receive, send)
                    return
        await self._app(scope, receive, send)
