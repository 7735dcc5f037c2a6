"""The HTTP application: routes, errors, keys, request ids, metrics and traces put together."""

import asyncio
import contextlib
import itertools
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import NotReady
from service.http import problems, v1, v2
from service.http.auth import Gate
from service.http.openapi import Shortcut
from service.metrics import Metrics
from service.pipeline import Classifier
from service.settings import Settings
from service.tracing import Tracing

log = structlog.get_logger()

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_PAGE = Path(__file__).parent / "http" / "page" / "index.html"


def create_app(settings: Settings) -> FastAPI:
    """Load and prove the models, and build the app that serves them. Raises StartupError."""
    release = version("stridevit")
    tracing = Tracing(settings.otlp_endpoint, version=release) if settings.otlp_endpoint else None
    metrics = Metrics()
    classifier = Classifier(settings, metrics)
    page = _PAGE.read_text(encoding="utf-8")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        classifier.start()
        polling = asyncio.create_task(_poll(classifier, settings.poll_seconds)) if settings.poll_seconds else None
        yield
        if polling:
            polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await polling
        await classifier.close()
        if tracing:
            await asyncio.to_thread(tracing.close)

    # Its pages come from here: FastAPI's own load from a CDN, and stay blank where there is no internet.
    app = FastAPIOffline(
        redoc_url=None,
        title="StrideViT",
        version=release,
        summary="Image classification with Vision Transformers whose keys and values are compressed.",
        lifespan=lifespan,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.classifier = classifier
    problems.install(app)
    for_people = v1.router(classifier)
    app.include_router(for_people)
    app.include_router(v2.router(classifier, version=app.version))

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["operation"])
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "alive"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["operation"])
    async def readyz() -> dict[str, str]:
        """Whether models take traffic; 503 while draining."""
        if not classifier.takes_traffic:
            raise NotReady("the service is starting or draining, or has no model: retry")
        return {"status": "ready"}

    @app.get("/metrics", tags=["operation"])
    async def prometheus() -> Response:
        """Prometheus metrics."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(Shortcut, routes=for_people.routes)
    # The last one added is the first to see a request: a preflight has no key, and every answer has an id.
    app.add_middleware(Gate, api_key_hashes=settings.api_key_hashes, admin_key_hash=settings.admin_key_hash)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(_Observe, metrics=metrics, tracing=tracing, log_requests=settings.log_requests)
    return app


async def _poll(classifier: Classifier, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await classifier.registry.refresh()
        except Exception:  # whatever it is, the service goes on, and so does the next look
            log.exception("looking at the repository failed")


class _Observe:
    """Gives each request an id, echoed in the answer, and counts, times, traces and logs it by route."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, tracing: Tracing | None, log_requests: str) -> None:
        self._app, self._metrics, self._tracing = app, metrics, tracing
        # Unique without asking the system for random numbers at every request.
        self._prefix, self._numbers = secrets.token_hex(8), itertools.count(1)
        # From this status on a request is logged.
        self._logged_from = {"none": 1000, "errors": 400, "all": 0}[log_requests]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        offered = headers.get("x-request-id", "")
        request_id = offered if _REQUEST_ID.fullmatch(offered) else f"{self._prefix}{next(self._numbers):016x}"
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(request_id=request_id, started=started)
        span = self._tracing.begin(scope["method"], headers.get("traceparent")) if self._tracing else None
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode())]
                if self._tracing:
                    own.append((b"traceparent", self._tracing.traceparent(span).encode()))
                message["headers"] = [*message["headers"], *own]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            # The route's template, so that a path made up by a client adds no time series.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, scope["method"], status, seconds)
            if self._tracing:
                self._tracing.end(
                    span,
                    name=f"{scope['method']} {route}",
                    attributes={
                        "http.request.method": scope["method"],
                        "http.route": route,
                        "http.response.status_code": status,
                        "stridevit.model": state.get("model", ""),
                        "stridevit.request_id": request_id,
                    },
                    timings_ms=state.get("timings_ms", {}),
                )
            if status >= self._logged_from:
                log.info(
                    "request",
                    request_id=request_id,
                    method=scope["method"],
                    route=route,
                    status=status,
                    ms=round(seconds * 1000, 3),
                    model=state.get("model"),
                )
