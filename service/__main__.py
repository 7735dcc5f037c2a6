"""`python -m service`: serve a repository of bundles over HTTP."""

import asyncio
import logging
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
import uvicorn
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from service.app import create_app
from service.classify import Classifier
from service.errors import StartError
from service.settings import Settings

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
console = Console(stderr=True)


@app.command()
def serve(
    repository: Annotated[Path | None, typer.Option(help="Folder of bundles, `NAME/VERSION/`. [models]")] = None,
    models: Annotated[
        str | None, typer.Option(help="Serve only these, names separated by commas. [all in the repository]")
    ] = None,
    default_model: Annotated[
        str | None, typer.Option(help="Answers requests that name no model. [the most accurate]")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 for any free one. [8000]")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda, cuda:N or tensorrt; never falls back silently. [auto]"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=0, help="Engine threads, and as many decoders; 0: the cores granted. [0]"),
    ] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Images in a batch, at most. [16]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error. [info]")] = None,
) -> None:
    """Serve image classification models over HTTP.

    A page is at `/`, the API's documentation at `/docs`, metrics at `/metrics`. Every setting can also be given as
    `STRIDEVIT_<NAME>` in the environment (flags win); `service/settings.py` lists all of them. SIGTERM or Ctrl-C
    finishes the accepted requests, then exits.

    Example: `python -m service --repository models --port 8000`, then
    `curl --data-binary @photo.jpg 'http://127.0.0.1:8000/v1/classify?model=cifar100-csra-r2'`
    """
    flags: dict[str, Any] = {
        "repository": repository,
        "models": models,
        "default_model": default_model,
        "host": host,
        "port": port,
        "device": device,
        "threads": threads,
        "max_batch": max_batch,
        "log_level": log_level,
    }
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
        _configure_logging(settings.log_level)
        application = create_app(settings)
    except ValidationError as error:
        for item in error.errors():
            place = ".".join(map(str, item["loc"])) or "combination"
            console.print(f"[red]error:[/] setting {place}: {escape(item['msg'])}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except StartError as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    server = _Server(
        uvicorn.Config(
            application,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=settings.drain_seconds,
        ),
        application.state.classifier,
    )
    # Once it has shut down, uvicorn raises again the signal that stopped it: by then all is done, and it ends with 0.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server.run()
    if not server.started:
        raise typer.Exit(1)


class _Server(uvicorn.Server):
    """Says that it is not ready, serves on for the grace period, then stops accepting and finishes what it accepted."""

    def __init__(self, config: uvicorn.Config, classifier: Classifier) -> None:
        super().__init__(config)
        self._classifier = classifier

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._classifier.ready = False
        await asyncio.sleep(self._classifier.settings.grace_seconds)
        await super().shutdown(sockets)


def _configure_logging(level: str) -> None:
    """JSON lines, or colours where a person watches; the libraries' logs go the same way."""
    names = logging.getLevelNamesMapping()
    if level.upper() not in names:
        raise StartError(f"unknown log level {level!r}: use debug, info, warning or error")
    number = names[level.upper()]
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
