"""The HTTP application: routes, errors, request ids and metrics put together."""

import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import problems, v1, v2
from service.classify import Classifier
from service.errors import NotReady
from service.metrics import Metrics
from service.settings import Settings

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_PAGE = Path(__file__).with_name("page.html")


def create_app(settings: Settings) -> FastAPI:
    """Load and prove the models, and build the app that serves them. Raises StartError."""
    metrics = Metrics()
    classifier = Classifier(settings, metrics)
    page = _PAGE.read_text(encoding="utf-8")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        classifier.start()
        yield
        await classifier.close()

    app = FastAPI(
        title="StrideViT",
        version=version("stridevit"),
        summary="Image classification with Vision Transformers whose keys and values are compressed.",
        lifespan=lifespan,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.classifier = classifier
    problems.install(app)
    app.include_router(v1.router(classifier))
    app.include_router(v2.router(classifier, version=app.version))

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/healthz", tags=["operation"])
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["operation"])
    async def readyz() -> dict[str, str]:
        """Whether models take traffic; 503 while draining."""
        if not classifier.ready:
            raise NotReady("the service is starting or draining: retry")
        return {"status": "ready"}

    @app.get("/metrics", tags=["operation"])
    async def prometheus() -> Response:
        """Prometheus metrics."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(_Observe, metrics=metrics)
    return app


class _Observe:
    """Gives each request an id, echoed in the answer, and counts and times it by route."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        offered = next((value.decode("latin-1") for key, value in scope["headers"] if key == b"x-request-id"), "")
        request_id = offered if _REQUEST_ID.fullmatch(offered) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            # The route's template, so that a path made up by a client adds no time series.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, scope["method"], status).inc()
            self._metrics.request_seconds.labels(route).observe(time.perf_counter() - started)
