"""docs/cli.md, from the commands and flags that Typer knows."""

import re
from collections.abc import Iterator
from typing import Any

from stridevit.command import COMMANDS
from tests.documentation.reference import markdown

_TEXT = """
Every command of `stridevit` with its flags, as `stridevit COMMAND --help` shows them. `python -m training`, `export`,
`service` and `loadtests` have the same commands. Settings of `serve`, `check` and `settings` are flags too:
[settings.md](settings.md) describes them.
"""
_SETTINGS = {"serve", "check", "engine-limit", "settings"}
"""Commands that take every setting of the service as a flag."""


def cli_page() -> str:
    """Every command, in the order of the help."""
    parts: list[str] = []
    for name, stand_in in COMMANDS.items():
        command = stand_in.load()
        nested = getattr(command, "commands", {})
        parts += _command(f"stridevit {name}", command, "##", settings=name in _SETTINGS)
        for own, part in nested.items():
            parts += _command(f"stridevit {name} {own}", part, "###", settings=False)
    return markdown.page("Commands", "the commands themselves", _TEXT, *parts)


def _command(name: str, command: Any, heading: str, *, settings: bool) -> Iterator[str]:
    yield f"{heading} {name}"
    yield _help(command.help)
    rows = [_row(parameter) for parameter in command.params if _shown(parameter, settings=settings)]
    if rows:
        yield markdown.table(["argument", "value", "default", "what it does"], rows)


def _shown(parameter: Any, *, settings: bool) -> bool:
    if getattr(parameter, "hidden", False) or parameter.name == "help":
        return False
    return not (settings and _is_setting(parameter.name))


def _is_setting(name: str) -> bool:
    from service.settings import Settings

    return name in Settings.model_fields


def _row(parameter: Any) -> tuple[str, str, str, str]:
    names = " / ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts] if name.startswith("-"))
    default = None if parameter.required or callable(parameter.default) else parameter.default
    shown = "required" if parameter.required else "–" if default in (None, (), "", False) else f"`{default}`"
    return names or f"`{(parameter.metavar or parameter.name).upper()}`", _kind(parameter), shown, _help(parameter.help)


def _kind(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return "flag"
    kind = parameter.type_descriptor
    if kind.is_choice:
        return " or ".join(f"`{getattr(choice, 'value', choice)}`" for choice in kind.choices)
    name = parameter.metavar or parameter.bare_type()
    bounds = [f"{sign} {limit:g}" for sign, limit in (("≥", parameter.min), ("≤", parameter.max)) if limit is not None]
    return " ".join([{"Path": "path", "str": "text"}.get(name, name), ", ".join(bounds)]).strip()


def _help(text: str | None) -> str:
    """The paragraphs of a help text, each in one line; lists stay lists."""
    paragraphs = re.split(r"\n\s*\n", (text or "").replace("\b", "").replace("\f", "\n\n").strip())
    return "\n\n".join(
        block.strip() if re.match(r"\s*[-*] ", block) else " ".join(block.split()) for block in paragraphs
    )
