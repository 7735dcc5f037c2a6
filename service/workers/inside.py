"""A worker's side: what the supervisor asks of it, and what it passes on to the supervisor.

Requests under /internal/ concern only this process, and need the supervisor's token. Those that are answered for all
workers belong to the supervisor. The front sends them there; those that arrive here all the same, because there is no
front or the path is written in an odd way, are passed on.
"""

import hmac
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs

import httpx
from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import BadRequest, BundleError, NotReady, RequestError, ServiceError
from service.http.body import read_small_body
from service.http.problems import error_response
from service.models.registry import Registry
from service.pipeline import Pipeline
from service.status import StatusReport
from service.workers.envoy import OF_ALL_EXACT, OF_ALL_PREFIX, TOKEN_HEADER

PREFIX: Final = "/internal/"
_TOKEN: Final = TOKEN_HEADER.encode()
_BODY_BYTES, _BODY_SECONDS = 64 * 1024, 30.0
_HOP_BY_HOP: Final = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"host", _TOKEN})


class Restore(BaseModel):
    """Versions of a model to serve."""

    name: str
    versions: list[int]
    withdraw: bool = False


_RESTORES: Final = TypeAdapter(list[Restore])
_Handler = Callable[[dict[str, str], Request], Awaitable[Response]]


class Inside:
    """ASGI middleware, outside all others."""

    def __init__(self, app: ASGIApp, *, of: FastAPI, supervisor: Path, token: str) -> None:
        """`of`: the application, whose state has the pipeline and the report; `supervisor`: its socket."""
        self._app, self._token, self._supervisor = app, token.encode(), supervisor
        pipeline: Pipeline = of.state.pipeline
        report: StatusReport = of.state.report
        self._handlers = _handlers(pipeline, report)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        if path.startswith(PREFIX):
            await self._own(path[len(PREFIX) :], scope, receive, send)
        elif path.startswith(OF_ALL_PREFIX) or path.rstrip("/") in OF_ALL_EXACT:
            await self._pass_on(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _own(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        offered = next((value for key, value in scope["headers"] if key == _TOKEN), b"")
        handler = self._handlers.get(name) if hmac.compare_digest(offered, self._token) else None
        if handler is None:
            # As for any path that does not exist.
            await self._app(scope, receive, send)
            return
        query = {key: values[0] for key, values in parse_qs(scope["query_string"].decode("latin-1")).items()}
        try:
            answer = await handler(query, request)
        except ServiceError as error:
            status = error.status if isinstance(error, RequestError) else 400
            answer = JSONResponse({"error": str(error), "kind": type(error).__name__}, status_code=status)
        await answer(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await read_small_body(request, max_bytes=_BODY_BYTES, timeout_seconds=_BODY_SECONDS)
            query: bytes = scope["query_string"]
            target = scope.get("raw_path", scope["path"].encode()) + (b"?" + query if query else b"")
            headers = [(key, value) for key, value in scope["headers"] if key not in _HOP_BY_HOP]
            async with client_of(self._supervisor, seconds=None) as client:
                url = httpx.URL("http://supervisor").copy_with(raw_path=target)
                async with client.stream(scope["method"], url, headers=headers, content=body) as found:
                    # As it was sent, perhaps compressed.
                    content = b"".join([part async for part in found.aiter_raw()])
            kept = [(key.lower(), value) for key, value in found.headers.raw if key.lower() not in _HOP_BY_HOP]
            answer = Response(content, status_code=found.status_code)
            answer.raw_headers = [*kept, (b"content-length", str(len(content)).encode())]
        except httpx.TransportError:
            answer = error_response(request, NotReady("the supervisor of the workers does not answer: retry"))
        except RequestError as error:
            answer = error_response(request, error)
        await answer(scope, receive, send)


def client_of(socket: Path, *, seconds: float | None, token: str = "") -> httpx.AsyncClient:
    """A client of a process that listens at a UNIX socket."""
    return httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=str(socket)),
        base_url="http://worker",
        headers={"accept-encoding": "identity", **({TOKEN_HEADER: token} if token else {})},
        timeout=seconds,
    )


def _handlers(pipeline: Pipeline, report: StatusReport) -> dict[str, _Handler]:
    registry = pipeline.registry

    async def ready(_: dict[str, str], __: Request) -> Response:
        pipeline.require_ready()
        return JSONResponse({})

    async def metrics(_: dict[str, str], __: Request) -> Response:
        return Response(pipeline.metrics.render(), media_type="text/plain; charset=utf-8")

    async def status(_: dict[str, str], __: Request) -> Response:
        return Response(report.take().model_dump_json(), media_type="application/json")

    async def index(_: dict[str, str], __: Request) -> Response:
        return JSONResponse(_index(registry))

    async def load(query: dict[str, str], _: Request) -> Response:
        await registry.load(query["name"])
        return JSONResponse(_index(registry))

    async def unload(query: dict[str, str], _: Request) -> Response:
        await registry.unload(query["name"])
        return JSONResponse(_index(registry))

    async def refresh(_: dict[str, str], __: Request) -> Response:
        await registry.refresh()
        return JSONResponse(_index(registry))

    async def restore(_: dict[str, str], request: Request) -> Response:
        body = await read_small_body(request, max_bytes=1 << 20, timeout_seconds=_BODY_SECONDS)
        failed: list[str] = []
        for wish in _RESTORES.validate_json(body):
            try:
                await registry.restore(wish.name, wish.versions, withdraw=wish.withdraw)
            except BundleError as error:
                failed.append(str(error))
        if failed:
            raise BadRequest("; ".join(failed))
        return JSONResponse(_index(registry))

    return {
        "ready": ready,
        "metrics": metrics,
        "status": status,
        "index": index,
        "load": load,
        "unload": unload,
        "refresh": refresh,
        "restore": restore,
    }


def _index(registry: Registry) -> list[dict[str, Any]]:
    return [
        {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
        for entry in registry.index
    ]


def dumps(restores: list[Restore]) -> bytes:
    """The body of `restore`."""
    return json.dumps([wish.model_dump() for wish in restores]).encode()
