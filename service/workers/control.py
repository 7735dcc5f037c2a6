"""The supervisor's own small application: probes, metrics, status and models of all workers."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.app import allow_origins, metrics_answer
from service.errors import BadRequest
from service.http import exchange, problems
from service.http.auth import KeyGate
from service.http.observe import Observe
from service.http.security_headers import SecurityHeaders
from service.http.v2 import repository_request
from service.keys import KeyRing
from service.metrics import Metrics
from service.settings import Settings
from service.workers.answers import Answers
from service.workers.repository import Repository

_BACKLOG: Final = 512


class Supervised(Protocol):
    """What the application needs from the supervisor."""

    repository: Repository
    answers: Answers

    def require_alive(self) -> None:
        """Raise NotReady if only a restart may help."""

    def require_ready(self) -> None:
        """Raise NotReady unless a worker takes traffic."""


def control_app(supervised: Supervised, settings: Settings, *, ring: KeyRing, metrics: Metrics) -> ASGIApp:
    """The application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    problems.install(app)
    both = ["GET", "HEAD"]

    @app.api_route("/healthz", methods=both)
    async def healthz() -> dict[str, str]:
        supervised.require_alive()
        return {"status": "alive"}

    @app.api_route("/readyz", methods=both)
    async def readyz() -> dict[str, str]:
        supervised.require_ready()
        return {"status": "ready"}

    @app.api_route("/v2/health/live", methods=both)
    async def live() -> dict[str, bool]:
        supervised.require_alive()
        return {"live": True}

    @app.api_route("/v2/health/ready", methods=both)
    async def ready() -> dict[str, bool]:
        supervised.require_ready()
        return {"ready": True}

    @app.api_route("/metrics", methods=both)
    async def prometheus(request: Request) -> Response:
        text = await supervised.answers.render_metrics(metrics.registry)
        return metrics_answer(text, accepted=request.headers.get("accept-encoding", ""))

    @app.api_route("/v1/status", methods=both, dependencies=[Depends(exchange.known_query())])
    async def status() -> Response:
        return Response(await supervised.answers.render_status(), media_type="application/json")

    _add_repository(app, supervised.repository)
    keys_needed = bool(settings.api_key_hashes or settings.keys_file)
    app.add_middleware(KeyGate, ring=ring, required=keys_needed, guarded_pages=settings.guarded_pages, metrics=metrics)
    allow_origins(app, settings.cors_origins)
    app.add_middleware(
        Observe,
        metrics=metrics,
        tracing=None,
        log_requests=settings.log_requests,
        security_headers=SecurityHeaders({}, parts=()),
    )
    return _WithoutSlash(app)


def _add_repository(app: FastAPI, models: Repository) -> None:
    @app.post("/v2/repository/index")
    async def index(request: Request) -> list[dict[str, str]]:
        only_ready = (await repository_request(request)).ready
        return [
            {
                "name": entry["name"],
                "version": "" if entry["version"] is None else str(entry["version"]),
                "state": entry["state"].upper(),
                "reason": entry["reason"],
            }
            for entry in await models.index()
            if entry["state"] == "ready" or not only_ready
        ]

    @app.post("/v2/repository/models/{name}/load")
    async def load(name: str, request: Request) -> dict[str, Any]:
        if (await repository_request(request)).parameters:
            raise BadRequest("a bundle is loaded as it was published: no configuration or files come with the request")
        await models.load(name)
        return {}

    @app.post("/v2/repository/models/{name}/unload")
    async def unload(name: str, request: Request) -> dict[str, Any]:
        await repository_request(request)
        await models.unload(name)
        return {}


class _WithoutSlash:
    """Ignores a slash at the end of a path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/":
            scope["path"] = scope["path"].rstrip("/")
        await self._app(scope, receive, send)


class ControlServer(uvicorn.Server):
    """The server of the control application, which leaves signals to the supervisor."""

    def __init__(self, app: object) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=1,
            )
        )

    async def answer_at(self, path: Path) -> None:
        """Answer at a UNIX socket until `should_exit`."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(str(path))
            listening.listen(_BACKLOG)
            await self.serve([listening])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none of them."""
        yield
