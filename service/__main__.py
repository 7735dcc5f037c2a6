"""`python -m service`: serve a repository of bundles over HTTP, check it, generate keys and show the settings."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from service import flags
from service.app import make_loader, make_registry, make_source
from service.bundle import list_repository
from service.engine_limit import measure_engine_limit, read_images
from service.errors import StartupError
from service.flags import with_settings
from service.keys import KeyEntry, new_key
from service.logs import Logs
from service.models.index import Entry
from service.models.model import Model
from service.remote.store import Key
from service.running import run
from service.scheduling.cost import Load
from service.scheduling.scheduler import Scheduler
from service.settings import Settings

# Locals in a traceback would show the hashes of keys.
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)


@app.callback(invoke_without_command=True)
@with_settings
def serve(settings: Settings, logs: Logs) -> None:
    """Serve image classification models over HTTP.

    `/` is a page to try it, `/docs` documents the API, and `/metrics` has the metrics. SIGTERM or Ctrl-C finishes the
    accepted requests, then exits; a second one exits at once.

    The exit status is 0 if all accepted requests were answered, 4 if some did not finish within
    `graceful_timeout_seconds` or a thread did not end, and 70 if the engine hung. A second signal, or one during
    startup, gives 128 plus its number; a failed start gives 1 or 3, and invalid settings give 2.

    With `--workers` several processes serve behind one port: SIGHUP replaces them one after the other.

    Every flag is also an environment variable, `STRIDEVIT_MAX_BATCH` for `--max-batch`, and a line in the TOML file
    that `--config` names: flags override the environment, which overrides the file. Lists are separated by commas.

    Example: `stridevit serve --repository models --port 8000`, then
    `curl --data-binary @photo.jpg 'http://127.0.0.1:8000/v1/classify?model=cifar100-csra-r2'`
    """
    if settings.workers not in ("0", "1"):
        # This imports an HTTP client, which a single process does not need.
        from service.workers.start import supervise  # noqa: PLC0415

        if supervise(settings, logs):
            return
    run(settings, logs)


@app.command()
@with_settings
def check(settings: Settings) -> None:
    """Load and verify every model that would be served, without serving: digests, golden outputs, device.

    The exit status is 0 if all are good, 1 if one is not, 2 if the settings are invalid.
    """
    # The table gives the errors; the log repeats them only on request.
    with Logs(settings.log_level if "log_level" in settings.model_fields_set else "critical"):
        _check(settings)


def _check(settings: Settings) -> None:
    # In a narrow terminal only the reasons may wrap.
    short = (Column(name, no_wrap=True) for name in ("name", "version", "variant", "precision", "top-1"))
    table = Table(*short, Column("state", overflow="fold"))
    good: set[str] = set()
    bad: set[str] = set()
    settings, missing = _copied(settings)
    for (name, version), reason in sorted(missing.items()):
        bad.add(name)
        table.add_row(name, str(version), *["–"] * 3, f"[red]{escape(reason)}[/]")
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


def _copied(settings: Settings) -> tuple[Settings, Mapping[Key, str]]:
    """The settings, with a local copy in place of a repository that is not a folder, and why versions are not in it.

    Raises StartupError or RepositoryError.
    """
    source = make_source(settings)
    if source is None:
        return settings, {}
    try:
        missing = source.update()
    finally:
        source.close()
    return settings.model_copy(update={"repository": source.folder}), missing


def _load_each(settings: Settings) -> Iterator[tuple[Entry, Model | None]]:
    """Every version that would be served, loaded one model at a time; None where loading failed.

    Raises BundleError or EngineError.
    """
    options = settings.engine_options()
    scheduler = Scheduler(load := Load(), cores=options.cores)
    loader = make_loader(settings, options, scheduler, load)
    try:
        for name in settings.models or list_repository(settings.folder).names:
            alone = settings.model_copy(update={"models": (name,), "default_model": None})
            registry = make_registry(alone, loader, scheduler)
            # The index holds the reason.
            with contextlib.suppress(StartupError):
                registry.load_all()
            ready = {model.version: model for model in registry.ready}
            for entry in registry.index:
                yield entry, ready.get(entry.version) if entry.version else None
            for model in ready.values():
                scheduler.on_engine(model.engines.close)
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

    `stridevit loadtest limit` compares the service, and a plain server, with it.

    Example: `stridevit engine-limit --model cifar100-mha --data photos`
    """
    with Logs("warning"):
        only, _ = _copied(settings.model_copy(update={"models": (model,)}))
        limit = measure_engine_limit(only, model, read_images(data), seconds=seconds)
    typer.echo(json.dumps(asdict(limit)) if as_json else limit.text())


@app.command()
def key(
    *,
    name: Annotated[
        str | None, typer.Option(help="Name of the key in logs and metrics: prints an entry for `keys_file`.")
    ] = None,
    scope: Annotated[
        list[str] | None, typer.Option(help="classify, read or admin; may be given several times. [classify]")
    ] = None,
    requests_per_second: Annotated[float | None, typer.Option(help="Long-term limit of requests per second.")] = None,
    burst: Annotated[int | None, typer.Option(help="Largest burst of requests within that rate.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Limit of requests in progress at once.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Days until it expires.")] = None,
) -> None:
    """Generate an API key, and its hash for the service.

    Give the key to its user. It is not stored anywhere; the service gets its hash. With `--name` the entry for the file
    of keys (`STRIDEVIT_KEYS_FILE`) goes to standard output and the key to standard error; the service rereads a changed
    file by itself. Without a name, put the hash into `STRIDEVIT_API_KEY_HASHES` (several are separated by commas) or
    `STRIDEVIT_ADMIN_KEY_HASH`.

    Example: `stridevit key --name alice --scope classify --requests-per-second 20 >> keys.toml`
    """
    made, digest = new_key()
    if name is None:
        if scope or requests_per_second or burst or max_concurrent or days:
            raise typer.BadParameter("scopes and limits belong to a key with a --name, in the file of keys")
        typer.echo(f"key      {made}\nSHA-256  {digest}")
        return
    values = {
        "name": name,
        "sha256": digest,
        "scopes": scope or ["classify"],
        "requests_per_second": requests_per_second,
        "burst": burst,
        "max_concurrent": max_concurrent,
        "expires": None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days),
    }
    try:
        entry = KeyEntry.model_validate(values)
    except ValidationError as error:
        item = error.errors(include_input=False)[0]
        raise typer.BadParameter(f"{'.'.join(map(str, item['loc'])) or 'key'}: {item['msg']}") from None
    typer.echo(f"key (shown once): {made}", err=True)
    typer.echo(entry.as_toml(), nl=False)


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


if __name__ == "__main__":
    app(prog_name="python -m service")
