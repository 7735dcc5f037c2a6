"""The application: creates the parts of the service from its settings, and puts them together."""

import asyncio
import contextlib
import gzip
import inspect
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse
from fastapi_offline import FastAPIOffline
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from service.errors import NotReady, RepositoryError, StartupError
from service.gauges import Gauges
from service.host import available_cores
from service.http import docs, hf, openapi, page, problems, v1, v1_compare, v1_live, v1_schemas, v2
from service.http.auth import KeyGate, offered
from service.http.compression import accepts_gzip
from service.http.fast_path import FastPath
from service.http.observe import Observe
from service.http.security_headers import SecurityHeaders
from service.http.shedding import Judge, Shedding
from service.image_work import seconds_per_pixel
from service.key_file import KeyFile, entries_of_settings
from service.keys import KeyEntry, KeyRing, Usage
from service.limits import Limits
from service.metrics import Metrics
from service.models.loading import Loader
from service.models.proof import EngineOptions
from service.models.registry import Registry
from service.pipeline import Pipeline
from service.remote.address import Address
from service.remote.mirror import Mirror
from service.remote.opening import open_mirror
from service.rollouts.rollout import Rollout
from service.rollouts.rollouts import Rollouts
from service.rollouts.start import settled
from service.scheduling.cost import Load
from service.scheduling.room import Room
from service.scheduling.scheduler import Scheduler
from service.scheduling.watchdog import Patience
from service.settings import Settings
from service.status import StatusReport
from service.tracing import open_tracing

log = structlog.get_logger()


def create_app(
    settings: Settings,
    *,
    clock: Callable[[], float] = time.perf_counter,
    source: Mirror | None = None,
    room: Room | None = None,
    usage: Callable[[str], Usage] | None = None,
    packed: Path | None = None,
) -> FastAPI:
    """Load and verify the models, and build the application that serves them. Raises StartupError.

    `source`: the result of `make_source`, from a caller that may have to close it while this function runs.
    `room`, `usage` (see `KeyRing`) and `packed` (see `Loader`): what several processes share.
    """
    release = version("stridevit")
    tracing = open_tracing(settings.otlp_endpoint, version=release)
    metrics = Metrics()
    ring = KeyRing(fixed := entries_of_settings(settings.api_key_hashes, settings.admin_key_hash), usage=usage)
    metrics.registry.register(ring)
    key_file = key_file_of(settings, ring, fixed)
    pipeline = make_pipeline(settings, metrics, clock, source, room=room, packed=packed)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        pipeline.start()
        if key_file:
            key_file.start()
        polling = (
            asyncio.create_task(_poll(pipeline.registry, settings.poll_seconds)) if settings.poll_seconds else None
        )
        yield
        pipeline.registry.close()
        if key_file:
            key_file.close()
        if polling:
            polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await polling
        await pipeline.close()
        if tracing:
            await asyncio.to_thread(tracing.close)

    # FastAPIOffline serves the parts of the documentation page: FastAPI's own page loads them from a CDN.
    app = FastAPIOffline(
        docs_url=None,
        redoc_url=None,
        static_url=docs.PARTS,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        title="StrideViT",
        version=release,
        summary="Image classification with Vision Transformers whose keys and values are compressed.",
        lifespan=lifespan,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.pipeline, app.state.key_file = pipeline, key_file
    problems.install(app)
    keys_needed = bool(settings.api_key_hashes or settings.keys_file)
    openapi.install(app, keys_needed=keys_needed, streamed=[v1_schemas.ComparisonEvent])
    v2_routers = [v2.probes(pipeline), v2.router(pipeline, version=release), v2.repository(pipeline)]
    docs_page = docs.DocsPage(app.title)
    routers = [
        page.router(),
        docs_page.router(),
        v1.router(pipeline),
        v1_compare.router(pipeline),
        v1_live.router(pipeline, report := StatusReport(pipeline, device=settings.engine_options().device)),
        *v2_routers,
        hf.router(pipeline),
    ]
    for router in routers:
        app.include_router(router)

    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    unavailable: dict[int | str, dict[str, Any]] = {503: {"description": inspect.getdoc(NotReady), "content": problem}}

    @app.get("/healthz", tags=["operation"], responses=unavailable)
    async def healthz() -> dict[str, str]:
        """Whether the process and its engine work; 503 if only a restart may help."""
        pipeline.require_alive()
        return {"status": "alive"}

    @app.get("/readyz", tags=["operation"], responses=unavailable)
    async def readyz() -> dict[str, str]:
        """Whether models take traffic; 503 while draining, or while the engine hangs."""
        pipeline.require_ready()
        return {"status": "ready"}

    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
    async def prometheus(request: Request) -> Response:
        """Prometheus metrics."""
        return metrics_answer(metrics.render(), accepted=request.headers.get("accept-encoding", ""))

    app.add_middleware(FastPath, routes=[route for router in routers for route in router.routes])
    # The middleware added last sees a request first: CORS before KeyGate, since a preflight has no key, and Observe
    # before both, so that every answer has an id.
    app.add_middleware(
        KeyGate,
        ring=ring,
        required=keys_needed,
        guarded_pages=settings.guarded_pages,
        metrics=metrics,
    )
    allow_origins(app, settings.cors_origins)
    app.add_middleware(
        Observe,
        metrics=metrics,
        tracing=tracing,
        log_requests=settings.log_requests,
        security_headers=SecurityHeaders(
            {page.PATH: page.headers(), docs.PATH: docs_page.headers}, parts=(f"{docs.PARTS}/", f"{page.PARTS}/")
        ),
    )
    app.state.report = report
    app.state.judge = Judge(
        pipeline=pipeline,
        metrics=metrics,
        cors_origins=settings.cors_origins,
        has_key=lambda scope: not keys_needed or any(ring.find(key) for key in offered(scope)),
    )
    app.add_middleware(Shedding, judge=app.state.judge)
    return app


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Let pages of these origins read answers in a browser."""
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )


def metrics_answer(text: bytes, *, accepted: str) -> Response:
    """The answer to a scrape, gzipped if the scraper accepts that."""
    headers = {"Vary": "Accept-Encoding"}
    if accepts_gzip(accepted):
        # The fastest level takes a fifth of the default's time; it shrinks the text to a sixteenth, not a twentieth.
        text, headers["Content-Encoding"] = gzip.compress(text, compresslevel=1), "gzip"
    return Response(text, media_type=CONTENT_TYPE_LATEST, headers=headers)


def make_pipeline(
    settings: Settings,
    metrics: Metrics,
    clock: Callable[[], float] = time.perf_counter,
    source: Mirror | None = None,
    *,
    room: Room | None = None,
    packed: Path | None = None,
) -> Pipeline:
    """A pipeline with all models loaded. Raises StartupError."""
    source = source or make_source(settings)
    load = Load(
        decode_threads=settings.decode_threads or settings.threads or available_cores(),
        seconds_per_pixel=seconds_per_pixel(exact=settings.exact_preprocessing),
        clock=clock,
    )
    patience = Patience(
        factor=settings.hang_factor,
        min_seconds=settings.hang_min_seconds,
        max_seconds=settings.hang_max_seconds,
        exit_seconds=settings.hang_exit_seconds,
    )
    options = settings.engine_options()
    scheduler = Scheduler(load, cores=options.cores, patience=patience, batch_share=settings.batch_share)
    loader = make_loader(settings, options, scheduler, load, packed=packed)
    registry = make_registry(settings, loader, scheduler, source)
    try:
        registry.load_all()
        splits = settled(settings.splits(), registry)
    except BaseException:
        registry.close()
        raise
    finally:
        loader.rest()
    pipeline = Pipeline(registry, scheduler, load, limits=limits_of(settings), metrics=metrics, room=room)
    if splits:
        rollouts = [Rollout(split, registry, metrics) for split in splits]
        max_bytes, max_images = settings.shadow_pending_bytes, settings.max_pending_images
        pipeline.rollouts = Rollouts(rollouts, scheduler, pipeline.decoders, max_images=max_images, max_bytes=max_bytes)
    metrics.registry.register(Gauges(pipeline))
    return pipeline


def key_file_of(settings: Settings, ring: KeyRing, fixed: Sequence[KeyEntry]) -> KeyFile | None:
    """What keeps the ring in step with the file of keys, in addition to the `fixed` keys. Raises StartupError."""
    if settings.keys_file is None:
        return None
    return KeyFile(settings.keys_file, ring, fixed=fixed, poll_seconds=settings.keys_poll_seconds)


def limits_of(settings: Settings) -> Limits:
    """The limits of requests."""
    return Limits(**{field.name: getattr(settings, field.name) for field in fields(Limits)})


def make_loader(
    settings: Settings, options: EngineOptions, scheduler: Scheduler, load: Load, *, packed: Path | None = None
) -> Loader:
    """The loader of models, as the settings configure it."""
    return Loader(
        scheduler,
        load,
        options,
        memory_bytes=settings.memory_bytes,
        timeout_seconds=settings.load_timeout_seconds,
        packed=packed,
    )


def make_source(settings: Settings) -> Mirror | None:
    """What copies the repository to this machine, unless it is a folder; the caller closes it. Raises StartupError."""
    if not isinstance(settings.repository, Address):
        return None
    try:
        return open_mirror(
            settings.repository,
            cache=settings.repository_cache,
            cache_bytes=settings.repository_cache_bytes,
            timeout_seconds=settings.repository_timeout_seconds,
            names=settings.models,
            versions_to_serve=settings.versions_to_serve,
            on_trial=_on_trial(settings),
        )
    except RepositoryError as error:
        raise StartupError(str(error)) from error


def make_registry(settings: Settings, loader: Loader, scheduler: Scheduler, source: Mirror | None = None) -> Registry:
    """A registry that holds no models yet; `source`: see `make_source`."""
    return Registry(
        loader,
        scheduler,
        repository=source.folder if source else settings.folder,
        source=source,
        names=settings.models,
        default_model=settings.default_model,
        alias=settings.alias,
        versions_to_serve=settings.versions_to_serve,
        step_up_headroom=settings.step_up_headroom,
        on_trial=_on_trial(settings),
    )


def _on_trial(settings: Settings) -> set[tuple[str, int]]:
    return {(split.candidate, split.version) for split in settings.splits() if split.version is not None}


async def _poll(registry: Registry, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await registry.refresh()
        except Exception:  # the service goes on, and the next scan may succeed
            log.exception("scanning the repository failed")
