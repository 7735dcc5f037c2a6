"""Routes that FastAPI documents and does not handle: its layers cost more than a small model's batch."""

from collections.abc import Callable, Coroutine, Iterable
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import RequestError
from service.http.problems import answer


class Direct(APIRoute):
    """Calls its endpoint with the request, and sends what it returns. `openapi_extra` tells what the endpoint takes."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint itself."""
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


class Shortcut:
    """ASGI middleware: takes requests for direct routes past the routing and the layers behind it."""

    def __init__(self, app: ASGIApp, *, routes: Iterable[BaseRoute]) -> None:
        """Of `routes`, those that are `Direct` and have no parameters in their path."""
        self._app = app
        self._routes = {
            (method, route.path): route
            for route in routes
            if isinstance(route, Direct) and not route.param_convertors
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive, send)
        try:
            response = await route.endpoint(request)
        except RequestError as error:
            response = answer(request, error)
        await response(scope, receive, send)


def query_parameters(*kinds: type[BaseModel], headers: dict[str, str]) -> list[dict[str, Any]]:
    """The fields of pydantic models as OpenAPI's query parameters, and headers by name and description."""
    parameters: list[dict[str, Any]] = []
    for kind in kinds:
        for name, schema in kind.model_json_schema()["properties"].items():
            description = schema.pop("description", "")
            parameters.append(
                {"name": name, "in": "query", "required": False, "description": description, "schema": schema}
            )
    return parameters + [
        {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}
        for name, text in headers.items()
    ]


_MEANING = {
    400: ("Damaged image or malformed body", "the image is damaged: image file is truncated"),
    401: ("No API key, or a wrong one", "an API key is needed: send it as `Authorization: Bearer KEY`"),
    403: ("Not with this key", "loading and unloading need the admin key"),
    404: ("Unknown model", "no model 'x' here; there are: cifar100-mha; families: cifar100"),
    408: ("The body took too long to arrive: safe to retry", "the body did not arrive within 30 s: send it again"),
    413: ("Body too large", "the body has 40,000,000 bytes; the limit is 33,554,432"),
    415: ("Not an image of an accepted format", "not an image of a format accepted here: JPEG, PNG, ..."),
    422: ("Too many pixels, or a parameter out of its range", "top_k: Input should be greater than or equal to 1"),
    429: (
        "No room, or no way to finish before the deadline: retry after `Retry-After` seconds. Nothing was done.",
        "the deadline leaves 20 ms and the work ahead takes about 95 ms: nothing was done for this request, ...",
    ),
    503: ("Not ready: safe to retry", "the service is starting or draining: retry"),
    504: (
        "The deadline passed while the request waited: safe to retry",
        "the deadline passed while the image waited for the engine: nothing was computed",
    ),
}


def responses(*statuses: int, example: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's descriptions of the problems that a route may answer, with examples; `example` is that of a 200."""
    described: dict[int | str, dict[str, Any]] = {
        status: {
            "description": _MEANING[status][0],
            "content": {
                "application/problem+json": {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "example": {
                        "type": "about:blank",
                        "title": HTTPStatus(status).phrase,
                        "status": status,
                        "detail": _MEANING[status][1],
                        "request_id": "c8c774003f9448b49c0964e4feeb8708",
                    },
                }
            },
        }
        for status in statuses
    }
    if example is not None:
        described[200] = {"content": {"application/json": {"example": example}}}
    return described
