"""Settings for people: flags of the command line, docs/settings.md, and where each value comes from.

All of it is made from the fields of `Settings`, so a new setting is declared and documented there and nowhere else.
"""

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource, SettingsError
from rich.console import Console
from rich.markup import escape

from service.errors import ServiceError
from service.settings import ENV_PREFIX, GROUPS, Settings, read_file

console = Console(stderr=True)

Given = dict[str, Any]
"""What was given as flags, by the name of the setting."""

_KINDS: Final[dict[Any, str]] = {Path: "path", bool: "boolean", int: "integer", float: "number", str: "text"}
_BOUNDS: Final = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every setting as a flag; its parameter `settings` gets the outcome, validated.

    Flags before a subcommand hold for it too; its own win. An error becomes a line that names the fix, and the exit
    status 2 for wrong settings, 1 for what cannot be done.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "settings"]
    context = next((p.name for p in own if p.annotation is typer.Context), None)

    @functools.wraps(command)
    def run(**values: Any) -> None:
        ctx: typer.Context = values[context] if context else values.pop("_context")
        flags = {name: values.pop(name) for name in Settings.model_fields}
        ctx.obj = {**(ctx.obj or {}), **{name: value for name, value in flags.items() if value is not None}}
        if ctx.invoked_subcommand is not None:
            return
        settings = _read(ctx.obj)
        try:
            command(settings=settings, **values)
        except ServiceError as error:
            _complain(str(error))
            raise typer.Exit(1) from None

    parameters = [*own, *_options()]
    if context is None:
        parameters.append(inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    return run


def origins(given: Given) -> dict[str, str]:
    """Where the value of each setting comes from. Raises SettingsError, as reading the settings would."""
    environment = EnvSettingsSource(Settings)()
    config = given.get("config", environment.get("config"))
    in_file = read_file(Path(config)) if config else {}
    found = {}
    for name in Settings.model_fields:
        if name in given:
            found[name] = f"flag {flag(name)}"
        elif name in environment:
            found[name] = f"environment {variable(name)}"
        elif name in in_file:
            found[name] = f"file {config}"
        else:
            found[name] = "default"
    return found


def values(settings: Settings) -> Iterator[tuple[str, str]]:
    """Each setting and its value as text, those that are nobody's business hidden."""
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        yield name, "hidden" if value and not field.repr else _shown(value) or "–"


def markdown() -> str:
    """docs/settings.md."""
    lines = [_PAGE]
    for name, field in Settings.model_fields.items():
        if name in GROUPS:
            lines += ["", f"## {GROUPS[name]}", "", "| setting | value | default | what it does |", "|---|---|---|---|"]
        default = f"`{shown}`{_mebibytes(name)}" if (shown := _shown(field.default)) else "–"
        lines.append(f"| `{name}` | {_kind(field)} | {default} | {_text(field)} |")
    return "\n".join(lines) + "\n"


_PAGE: Final = f"""\
# Settings of the service

<!-- Made by `python -m service settings --markdown > docs/settings.md` from service/settings.py: change it there. -->

Each setting can be given in three ways; where several say something, the first of these wins:

1. a flag, `--max-batch 8`; booleans are `--tf32` and `--no-tf32`;
2. a variable in the environment, `{ENV_PREFIX}MAX_BATCH=8`; an empty one counts as unset;
3. a line in a TOML file, `max_batch = 8`, which `--config FILE` or `{ENV_PREFIX}CONFIG` names. A key that is no
   setting is an error.

Lists are separated by commas, in TOML they may be real ones: `models = ["a", "b"]`. An empty flag, `--models ""`, takes
back what the environment or the file says. `python -m service settings` shows the values in effect and where each comes
from; `python -m service check` proves them and the models, without serving.

Kubernetes sets `{ENV_PREFIX}PORT` by itself, to a URL, beside a Service that is named `stridevit`: give the Service
another name, or the pod `enableServiceLinks: false`."""


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + name.upper()


def _read(given: Given) -> Settings:
    """The settings in effect. Exits with 2 and a line for each that is wrong, which says where that one was given."""
    for wrong, right in _misspelt():
        console.print(f"[yellow]warning:[/] {wrong} is no setting: did you mean {right}?", highlight=False)
    try:
        return Settings(**given)
    except ValidationError as error:
        places = origins(given)
        for item in error.errors(include_input=False):
            name = str(item["loc"][0]) if item["loc"] else ""
            place = f"{name} (from {places[name]}): " if name in places else ""
            _complain(place + item["msg"].removeprefix("Value error, "))
    except SettingsError as error:
        _complain(str(error))
    raise typer.Exit(2)


def _complain(message: str) -> None:
    console.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


def _misspelt() -> Iterator[tuple[str, str]]:
    """Variables that are no setting but nearly one. Others with our prefix are not ours alone to forbid."""
    names = [variable(name) for name in Settings.model_fields]
    for name in sorted(os.environ):
        if name.startswith(ENV_PREFIX) and name not in names:
            for near in difflib.get_close_matches(name, names, n=1, cutoff=0.9):
                yield name, near


def _options() -> Iterator[inspect.Parameter]:
    panel = ""
    for name, field in Settings.model_fields.items():
        panel = GROUPS.get(name, panel)
        shown = _shown(field.default) + _mebibytes(name)
        yes_or_no = field.annotation is bool
        option = typer.Option(
            f"{flag(name)}/--no-{flag(name)[2:]}" if yes_or_no else flag(name),
            help=_text(field) + (f" [{shown}]" if shown else ""),
            metavar=None if yes_or_no else _metavar(field),
            rich_help_panel=panel,
            show_default=False,
        )
        # Text, whatever the setting's type is: pydantic reads it, as it does the environment's.
        kind: Any = bool | None if yes_or_no else str | None
        annotation: Any = Annotated[kind, option]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None)


def _metavar(field: FieldInfo) -> str:
    kind = _kind(field)
    return kind.replace(" or ", "|") if " or " in kind else kind.upper()


def _kind(field: FieldInfo) -> str:
    """What values a setting takes."""
    annotation = field.annotation
    if get_origin(annotation) is tuple:
        return "list"
    if get_origin(annotation) is Literal:
        return " or ".join(get_args(annotation))
    inner = next((part for part in get_args(annotation) if part is not type(None)), annotation)
    while get_origin(inner) is Annotated:
        inner = get_args(inner)[0]
    bounds = [
        f"{sign} {bound}"
        for constraint in field.metadata
        for name, sign in _BOUNDS.items()
        if (bound := getattr(constraint, name, None)) is not None
    ]
    return f"{_KINDS[inner]} {', '.join(bounds)}".strip()


def _text(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _mebibytes(name: str) -> str:
    value = Settings.model_fields[name].default
    return f" ({value >> 20} MiB)" if name.endswith("_bytes") and value else ""


def _shown(value: object) -> str:
    """A value as one would write it; empty for none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is None else str(value)
