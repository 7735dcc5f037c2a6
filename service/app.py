"""The application: the parts of the service made from its settings, and put together."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields
from importlib.metadata import version

import structlog
from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST

from service.gauges import Gauges
from service.host import available_cores
from service.http import page, problems, v1, v2
from service.http.auth import KeyGate
from service.http.fast_path import FastPath
from service.http.observe import Observe
from service.http.shedding import Shedding
from service.image_work import seconds_per_pixel
from service.metrics import Metrics
from service.models.loading import Loader
from service.models.registry import Registry
from service.pipeline import Limits, Pipeline
from service.scheduling.cost import Load
from service.scheduling.scheduler import Scheduler
from service.settings import Settings
from service.tracing import Tracing

log = structlog.get_logger()


def create_app(settings: Settings, *, clock: Callable[[], float] = time.perf_counter) -> FastAPI:
    """Load and verify the models, and build the application that serves them. Raises StartupError."""
    release = version("stridevit")
    tracing = Tracing(settings.otlp_endpoint, version=release) if settings.otlp_endpoint else None
    metrics = Metrics()
    pipeline = make_pipeline(settings, metrics, clock)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        pipeline.start()
        polling = (
            asyncio.create_task(_poll(pipeline.registry, settings.poll_seconds)) if settings.poll_seconds else None
        )
        yield
        if polling:
            polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await polling
        await pipeline.close()
        if tracing:
            await asyncio.to_thread(tracing.close)

    # Its documentation pages work offline: FastAPI's own load from a CDN.
    app = FastAPIOffline(
        redoc_url=None,
        title="StrideViT",
        version=release,
        summary="Image classification with Vision Transformers whose keys and values are compressed.",
        lifespan=lifespan,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.pipeline = pipeline
    problems.install(app)
    v2_routers = [v2.probes(pipeline), v2.router(pipeline, version=release), v2.repository(pipeline)]
    routers = [page.router(), v1.router(pipeline), *v2_routers]
    for router in routers:
        app.include_router(router)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["operation"])
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "alive"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["operation"])
    async def readyz() -> dict[str, str]:
        """Whether models take traffic; 503 while draining."""
        pipeline.require_ready()
        return {"status": "ready"}

    @app.get("/metrics", tags=["operation"])
    async def prometheus() -> Response:
        """Prometheus metrics."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(FastPath, routes=[route for router in routers for route in router.routes])
    # The last one added is the first to see a request: a preflight has no key, and every answer has an id.
    app.add_middleware(KeyGate, api_key_hashes=settings.api_key_hashes, admin_key_hash=settings.admin_key_hash)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(Observe, metrics=metrics, tracing=tracing, log_requests=settings.log_requests)
    app.add_middleware(Shedding, pipeline=pipeline, metrics=metrics, cors=bool(settings.cors_origins))
    return app


def make_pipeline(settings: Settings, metrics: Metrics, clock: Callable[[], float] = time.perf_counter) -> Pipeline:
    """A pipeline with all models loaded. Raises StartupError."""
    load = Load(
        decode_threads=settings.decode_threads or settings.threads or available_cores(),
        seconds_per_pixel=seconds_per_pixel(),
        clock=clock,
    )
    scheduler = Scheduler(load, batch_share=settings.batch_share)
    registry = make_registry(settings, scheduler, load)
    registry.load_all()
    limits = Limits(**{field.name: getattr(settings, field.name) for field in fields(Limits)})
    pipeline = Pipeline(registry, scheduler, load, limits=limits, metrics=metrics)
    metrics.registry.register(Gauges(pipeline))
    return pipeline


def make_registry(settings: Settings, scheduler: Scheduler, load: Load) -> Registry:
    """A registry of no models yet. Raises EngineError if the device is unavailable."""
    loader = Loader(
        scheduler,
        load,
        device=settings.device,
        threads=settings.threads or available_cores(),
        intra_op_threads=settings.intra_op_threads,
        max_batch=settings.max_batch,
        tuning=settings.tuning(),
    )
    return Registry(
        loader,
        scheduler,
        repository=settings.repository,
        names=settings.models,
        default_model=settings.default_model,
        versions_to_serve=settings.versions_to_serve,
        step_up_headroom=settings.step_up_headroom,
    )


async def _poll(registry: Registry, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await registry.refresh()
        except Exception:  # the service goes on, and the next scan may succeed
            log.exception("scanning the repository failed")
