"""The settings as flags of the command line and as docs/settings.md, and the origin of each value.

Everything is generated from the fields of `Settings`: a new setting is declared and documented only there.
"""

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import structlog
import typer
from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource, SettingsError
from rich.console import Console
from rich.markup import escape

from service.errors import ServiceError
from service.logs import Logs
from service.settings import ENV_PREFIX, GROUPS, Settings, read_file

console = Console(stderr=True)

Given = dict[str, Any]
"""Values given as flags, by the name of the setting."""

Level = Literal["warning", "error"]
_Voice = Callable[[Level, str], None]
"""How a command reports what is wrong with its settings: as a log line, or as text for people."""

_KINDS: Final = {"string": "text", "array": "list"}
"""Types of JSON schema under their names in the documentation, where these differ."""
_BOUNDS: Final = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every setting as a flag; its parameter `settings` receives the validated settings.

    A parameter `given` receives the values of the flags. Flags before a subcommand apply to it too; its own override
    them. An error is one line that names the fix; the exit status is 2 for invalid settings, 1 if the command fails.

    A parameter `logs` makes the command a service: it receives the logging, which begins before the settings are read,
    and all errors, unexpected ones too, are lines of the log.
    """
    own = inspect.signature(command).parameters

    @functools.wraps(command)
    def run(ctx: typer.Context, **values: Any) -> None:
        flags = {name: values.pop(name) for name in Settings.model_fields}
        ctx.obj = {**(ctx.obj or {}), **{name: value for name, value in flags.items() if value is not None}}
        if ctx.invoked_subcommand is not None:
            return
        with Logs() if "logs" in own else nullcontext() as logs:
            voice: _Voice = _log if logs else _print
            values |= {"settings": _read(ctx.obj, voice, logs), "given": ctx.obj, "logs": logs}
            try:
                command(**{name: values[name] for name in own})
            except ServiceError as error:
                voice("error", str(error))
                raise typer.Exit(1) from None
            except Exception as error:
                # Logged as one event with its traceback, which Typer would print over many lines.
                if not logs or isinstance(error, typer.Exit | typer.Abort):
                    raise
                structlog.get_logger().exception("a fault ended the service")
                raise typer.Exit(1) from None

    keyword_only = inspect.Parameter.KEYWORD_ONLY
    context = inspect.Parameter("ctx", keyword_only, annotation=typer.Context)
    others = [p.replace(kind=keyword_only) for name, p in own.items() if name not in ("settings", "given", "logs")]
    run.__signature__ = inspect.Signature([context, *others, *_parameters()])  # type: ignore[attr-defined]
    return run


def origins(given: Given) -> dict[str, str]:
    """Where the value of each setting comes from. Raises SettingsError, as reading the settings would."""
    environment = EnvSettingsSource(Settings)()
    config = {**environment, **given}.get("config")
    found = dict.fromkeys(Settings.model_fields, "default")
    found |= dict.fromkeys(read_file(Path(config)) if config else {}, f"file {config}")
    found |= {name: f"environment {variable(name)}" for name in environment}
    return found | {name: f"flag {flag(name)}" for name in given}


def values(settings: Settings) -> Iterator[tuple[str, str]]:
    """Each setting and its value as text, with secrets hidden."""
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        yield name, "hidden" if value and not field.repr else _shown(value) or "–"


def markdown() -> str:
    """docs/settings.md: the tables of all settings, within the text of `settings_page.md`."""
    lines: list[str] = []
    for name in Settings.model_fields:
        if name in GROUPS:
            lines += ["", f"## {GROUPS[name]}", "", "| setting | value | default | what it does |", "|---|---|---|---|"]
        default = f"`{shown}`" if (shown := _default(name)) else "–"
        lines.append(f"| `{name}` | {_kind(name)} | {default} | {_text(name)} |")
    page = Path(__file__).with_name("settings_page.md").read_text(encoding="utf-8")
    return page.replace("$tables", "\n".join(lines[1:]))


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + name.upper()


def _read(given: Given, voice: _Voice, logs: Logs | None) -> Settings:
    """The settings in effect. Exits with status 2 and one line for each invalid one, which says where it was given."""
    try:
        settings = Settings(**given)
        if logs:
            logs.adjust(
                level=settings.log_level,
                buffer_bytes=settings.log_buffer_bytes,
                flush_seconds=settings.log_flush_seconds,
            )
        for misspelt, name in _misspelt():
            voice("warning", f"{misspelt} is not a setting: did you mean {name}?")
        return settings
    except ValidationError as error:
        places = origins(given)
        for item in error.errors(include_input=False):
            name = str(item["loc"][0]) if item["loc"] else ""
            place = f"{name} (from {places[name]}): " if name in places else ""
            voice("error", place + item["msg"].removeprefix("Value error, "))
    except SettingsError as error:
        voice("error", str(error))
    raise typer.Exit(2)


def _print(level: Level, message: str) -> None:
    colour = {"warning": "yellow", "error": "red"}[level]
    console.print(f"[{colour}]{level}:[/] {escape(message)}", highlight=False, soft_wrap=True)


def _log(level: Level, message: str) -> None:
    log = structlog.get_logger()
    (log.error if level == "error" else log.warning)(message)


def _misspelt() -> Iterator[tuple[str, str]]:
    """Environment variables that resemble a setting. Other variables with our prefix may belong to other programs."""
    names = [variable(name) for name in Settings.model_fields]
    for name in sorted(os.environ):
        if name.startswith(ENV_PREFIX) and name not in names:
            for near in difflib.get_close_matches(name, names, n=1, cutoff=0.9):
                yield name, near


def _parameters() -> Iterator[inspect.Parameter]:
    """The settings as parameters of a command, for Typer."""
    group = ""
    for name in Settings.model_fields:
        group = GROUPS.get(name, group)
        is_boolean, default = _kind(name) == "boolean", _default(name)
        option = typer.Option(
            f"{flag(name)}/--no-{flag(name)[2:]}" if is_boolean else flag(name),
            help=_text(name) + (f" [{default}]" if default else ""),
            metavar=None if is_boolean else "|".join(_schema(name).get("enum", [_kind(name).upper()])),
            rich_help_panel=group,
            show_default=False,
        )
        # As text: pydantic parses it, as it parses environment variables.
        annotation: Any = Annotated[bool | None if is_boolean else str | None, option]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None)


def _kind(name: str) -> str:
    """Which values a setting takes."""
    schema = _schema(name)
    if "enum" in schema:
        return " or ".join(schema["enum"])
    kind = schema.get("format", schema["type"])
    bounds = [f"{sign} {schema[keyword]}" for keyword, sign in _BOUNDS.items() if keyword in schema]
    return f"{_KINDS.get(kind, kind)} {', '.join(bounds)}".strip()


def _schema(name: str) -> dict[str, Any]:
    """The JSON schema of a setting's values, without null."""
    schema: dict[str, Any] = _schemas()[name]
    return next((part for part in schema.get("anyOf", ()) if part["type"] != "null"), schema)


@functools.cache
def _schemas() -> Any:
    return Settings.model_json_schema()["properties"]


def _text(name: str) -> str:
    return " ".join((Settings.model_fields[name].description or "").split())


def _default(name: str) -> str:
    """A setting's default as text; empty for none."""
    value = Settings.model_fields[name].default
    return _shown(value) + (f" ({value >> 20} MiB)" if name.endswith("_bytes") and value else "")


def _shown(value: object) -> str:
    """A value in the form in which it is given; empty for none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is None else str(value)
