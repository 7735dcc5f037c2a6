"""`python -m service`: serve a repository of bundles over HTTP, or prove it, make keys and show the settings."""

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
import uvicorn
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service import flags
from service.app import create_app
from service.bundle import model_names
from service.engine_limit import measure_engine_limit, read_images
from service.errors import StartupError
from service.flags import with_settings
from service.http.keys import new_key
from service.pipeline import Classifier, make_registry
from service.scheduling.cost import Load
from service.scheduling.scheduler import Scheduler
from service.settings import Settings

# Locals in a traceback would show the hashes of keys.
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)


@app.callback(invoke_without_command=True)
@with_settings
def serve(settings: Settings) -> None:
    """Serve image classification models over HTTP, or run one of the commands below.

    A page is at `/`, the API's documentation at `/docs`, metrics at `/metrics`. SIGTERM or Ctrl-C finishes the accepted
    requests, then exits.

    Every flag is also a variable in the environment, `STRIDEVIT_MAX_BATCH` for `--max-batch`, and a line in the TOML
    file that `--config` names: flags win over the environment, that over the file. Lists are separated by commas.

    Example: `python -m service --repository models --port 8000`, then
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
        application.state.classifier,
    )
    # Once it has shut down, uvicorn raises again the signal that stopped it: by then all is done, and it ends with 0.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server.run()
    if not server.started:
        raise typer.Exit(1)


@app.command(name="check")
@with_settings
def check_command(settings: Settings) -> None:
    """Load and prove every model that would be served, without serving: digests, golden outputs, device.

    The exit status is 0 if all are good, 1 if one is not, 2 if the settings are wrong.
    """
    # The table says what went wrong; the log says it too where it was asked for.
    _configure_logging(settings.log_level if "log_level" in settings.model_fields_set else "critical")
    rows = list(check(settings))
    table = Table("name", "version", "variant", "precision", "top-1", "state")
    for row in rows:
        state = "[green]good[/]" if row.good else f"[red]{escape(row.reason)}[/]"
        table.add_row(row.name, row.version, row.variant, row.precision, row.top1, state)
    Console().print(table)
    if settings.default_model is not None and settings.default_model not in {row.name for row in rows if row.good}:
        raise StartupError(f"default_model {settings.default_model!r} is not among the good models")
    if not rows or not all(row.good for row in rows):
        raise typer.Exit(1)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A version of a model that was proven, or the reason why it cannot be served."""

    name: str
    version: str = "–"
    variant: str = "–"
    precision: str = "–"
    top1: str = "–"
    good: bool = False
    reason: str = ""


def check(settings: Settings) -> Iterator[Checked]:
    """Load the models that the settings ask for, one after the other. Raises BundleError or EngineError."""
    for name in settings.models or model_names(settings.repository):
        alone = settings.model_copy(update={"models": (name,), "default_model": None})
        scheduler = Scheduler(load := Load())
        registry = make_registry(alone, scheduler, load)
        # The index says why.
        with contextlib.suppress(StartupError):
            registry.load_all()
        ready = {model.version: model for model in registry.ready}
        for entry in registry.index:
            if entry.version not in ready:
                yield Checked(name=name, version=str(entry.version or "–"), reason=entry.reason)
                continue
            manifest = ready[entry.version].manifest
            yield Checked(
                name=name,
                version=str(entry.version),
                variant=manifest.attention.variant if manifest.attention else manifest.architecture,
                precision=manifest.precision,
                top1=f"{manifest.accuracy.top1:.2%}" if manifest.accuracy else "–",
                good=True,
            )
        for model in ready.values():
            scheduler.on_engine(model.engine.close)


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

    `python -m loadtests limit` sets the service, and a plain server, against it.

    Example: `python -m service engine-limit --model cifar100-mha --data photos`
    """
    _configure_logging("warning")
    limit = measure_engine_limit(settings, model, read_images(data), seconds=seconds)
    typer.echo(json.dumps(asdict(limit)) if as_json else limit.text())


@app.command()
def key() -> None:
    """Make an API key, and the hash by which the service knows it.

    Give the key to whoever shall use it, and put the hash into `STRIDEVIT_API_KEY_HASHES` (several are separated by
    commas) or `STRIDEVIT_ADMIN_KEY_HASH`. The key itself is stored nowhere.
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
    """Show the settings in effect, and where the value of each comes from. Hashes of keys are hidden."""
    if markdown:
        typer.echo(flags.markdown(), nl=False)
        return
    origins = flags.origins(given)
    table = Table("setting", "value", "from")
    for name, value in flags.values(settings):
        table.add_row(name, escape(value), escape(origins[name]))
    Console().print(table)


class _Server(uvicorn.Server):
    """Says that it is not ready, serves on for the grace period, then stops accepting and finishes what it accepted."""

    def __init__(self, config: uvicorn.Config, classifier: Classifier) -> None:
        super().__init__(config)
        self._classifier = classifier

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._classifier.ready = False
        await asyncio.sleep(self._classifier.settings.shutdown_delay_seconds)
        await super().shutdown(sockets)


def _configure_logging(level: str) -> None:
    """JSON lines, or colours where a person watches; the libraries' logs go the same way."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    watched = sys.stderr.isatty()
    renderer: Any = structlog.dev.ConsoleRenderer() if watched else structlog.processors.JSONRenderer()
    errors = [] if watched else [structlog.processors.format_exc_info]
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
    # Pillow warns about odd metadata in clients' files; that is no business of the log.
    warnings.filterwarnings("ignore", module="PIL")


if __name__ == "__main__":
    app(prog_name="python -m service")
