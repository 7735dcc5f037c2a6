"""`python -m service`: serve a repository of bundles over HTTP, check it, generate keys and show the settings."""

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
import uvicorn
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service import flags
from service.app import create_app, make_loader, make_registry
from service.bundle import list_repository
from service.engine_limit import measure_engine_limit, read_images
from service.errors import StartupError
from service.flags import with_settings
from service.http.auth import new_key
from service.models.index import Entry
from service.models.model import Model
from service.pipeline import Pipeline
from service.scheduling.cost import Load
from service.scheduling.scheduler import Scheduler
from service.settings import Settings

# Locals in a traceback would show the hashes of keys.
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)


@app.callback(invoke_without_command=True)
@with_settings
def serve(settings: Settings) -> None:
    """Serve image classification models over HTTP.

    `/` is a page to try it, `/docs` documents the API, and `/metrics` has the metrics. SIGTERM or Ctrl-C finishes the
    accepted requests, then exits.

    Every flag is also an environment variable, `STRIDEVIT_MAX_BATCH` for `--max-batch`, and a line in the TOML file
    that `--config` names: flags override the environment, which overrides the file. Lists are separated by commas.

    Example: `stridevit serve --repository models --port 8000`, then
    `curl --data-binary @photo.jpg 'http://127.0.0.1:8000/v1/classify?model=cifar100-csra-r2'`
    """
    _configure_logging(settings.log_level)
    application = create_app(settings)
    server = _Server(
        uvicorn.Config(
            application,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
            timeout_graceful_shutdown=settings.graceful_timeout_seconds,
        ),
        application.state.pipeline,
        delay_seconds=settings.shutdown_delay_seconds,
    )
    # After shutdown, uvicorn raises the signal that stopped it again. All is done by then: ignore it, and exit with 0.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server.run()
    if not server.started:
        raise typer.Exit(1)


@app.command()
@with_settings
def check(settings: Settings) -> None:
    """Load and verify every model that would be served, without serving: digests, golden outputs, device.

    The exit status is 0 if all are good, 1 if one is not, 2 if the settings are invalid.
    """
    # The table gives the errors; the log repeats them only on request.
    _configure_logging(settings.log_level if "log_level" in settings.model_fields_set else "critical")
    table = Table("name", "version", "variant", "precision", "top-1", "state")
    good: set[str] = set()
    bad: set[str] = set()
    for entry, model in _load_each(settings):
        (good if model else bad).add(entry.name)
        cells, state = ["–"] * 3, f"[red]{escape(entry.reason)}[/]"
        if model:
            manifest, state = model.manifest, "[green]good[/]"
            variant = manifest.attention.variant if manifest.attention else manifest.architecture
            cells = [variant, manifest.precision, f"{manifest.accuracy.top1:.2%}" if manifest.accuracy else "–"]
        table.add_row(entry.name, str(entry.version or "–"), *cells, state)
    Console().print(table)
    if settings.default_model is not None and settings.default_model not in good:
        raise StartupError(f"default_model {settings.default_model!r} is not among the good models")
    if bad or not good:
        raise typer.Exit(1)


def _load_each(settings: Settings) -> Iterator[tuple[Entry, Model | None]]:
    """Every version that would be served, loaded one model after the other; None where that failed.

    Raises BundleError or EngineError.
    """
    scheduler = Scheduler(load := Load())
    loader = make_loader(settings, scheduler, load)
    try:
        for name in settings.models or list_repository(settings.repository).names:
            alone = settings.model_copy(update={"models": (name,), "default_model": None})
            registry = make_registry(alone, loader, scheduler)
            # The index holds the reason.
            with contextlib.suppress(StartupError):
                registry.load_all()
            ready = {model.version: model for model in registry.ready}
            for entry in registry.index:
                yield entry, ready.get(entry.version) if entry.version else None
            for model in ready.values():
                scheduler.on_engine(model.engine.close)
    finally:
        loader.rest()


@app.command()
@with_settings
def engine_limit(
    settings: Settings,
    *,
    model: Annotated[str, typer.Option(help="Name of the model; its newest version is measured.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of image files to decode in turn. [a generated JPEG of 100 kB]")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Measured seconds at the best batch size.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Measure decoding and the engine together without HTTP: the most that this machine can serve.

    `stridevit loadtest limit` sets the service, and a plain server, against it.

    Example: `stridevit engine-limit --model cifar100-mha --data photos`
    """
    _configure_logging("warning")
    limit = measure_engine_limit(settings, model, read_images(data), seconds=seconds)
    typer.echo(json.dumps(asdict(limit)) if as_json else limit.text())


@app.command()
def key() -> None:
    """Generate an API key, and its hash for the service.

    Give the key to its user, and put the hash into `STRIDEVIT_API_KEY_HASHES` (several are separated by commas) or
    `STRIDEVIT_ADMIN_KEY_HASH`. The key itself is not stored anywhere.
    """
    made, digest = new_key()
    typer.echo(f"key      {made}\nSHA-256  {digest}")


@app.command(name="settings")
@with_settings
def show_settings(
    settings: Settings,
    given: flags.Given,
    *,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print `docs/settings.md` instead.")] = False,
) -> None:
    """Show the settings in effect and the origin of each value. Hashes of keys are hidden."""
    if markdown:
        typer.echo(flags.markdown(), nl=False)
        return
    origins = flags.origins(given)
    table = Table("setting", "value", "origin")
    for name, value in flags.values(settings):
        table.add_row(name, escape(value), escape(origins[name]))
    Console().print(table)


class _Server(uvicorn.Server):
    """At shutdown: reports that it is not ready, serves on for the delay, then finishes what it accepted."""

    def __init__(self, config: uvicorn.Config, pipeline: Pipeline, *, delay_seconds: float) -> None:
        super().__init__(config)
        self._pipeline, self._delay_seconds = pipeline, delay_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._pipeline.ready = False
        # Nobody waits for a model that is only being loaded.
        self._pipeline.registry.close()
        await asyncio.sleep(self._delay_seconds)
        await super().shutdown(sockets)


def _configure_logging(level: str) -> None:
    """Log JSON lines, or coloured text on a terminal, also for the logs of libraries."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    on_terminal = sys.stderr.isatty()
    renderer: Any = structlog.dev.ConsoleRenderer() if on_terminal else structlog.processors.JSONRenderer()
    errors = [] if on_terminal else [structlog.processors.format_exc_info]
    structlog.configure(
        processors=[*shared, *errors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *errors, renderer],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(level=max(number, logging.INFO), handlers=[handler], force=True)
    # Pillow warns about odd metadata in clients' files.
    warnings.filterwarnings("ignore", module="PIL")


if __name__ == "__main__":
    app(prog_name="python -m service")
