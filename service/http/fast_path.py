"""What comes before FastAPI's router.

Fast routes, which it documents but does not serve: its layers cost more than a small model's batch. HEAD, which it does
not answer on routes that offer GET. And a slash at the end of a path, which it answers with a redirect that clients do
not follow with a body.
"""

from collections.abc import Iterable

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import RequestError
from service.http.problems import error_response


class FastRoute(APIRoute):
    """Marks a route whose endpoint takes the request and returns the response; `openapi_extra` describes the rest."""


class FastPath:
    """ASGI middleware, the innermost one: calls the endpoints of fast routes directly, and FastAPI for all others."""

    def __init__(self, app: ASGIApp, *, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes = [route for route in routes if isinstance(route, FastRoute)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            await self._head(scope, receive, send)
            return
        if scope["method"] == "POST":
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

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as to a GET, without the body."""

        async def send_head(message: Message) -> None:
            # The server looks at the method, too, when it frames the answer.
            scope["method"] = "HEAD"
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        scope["method"] = "GET"
        try:
            await self._app(scope, receive, send_head)
        finally:
            scope["method"] = "HEAD"
