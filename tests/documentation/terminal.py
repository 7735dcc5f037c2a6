"""Runs the commands of a page as a reader would: in one folder, against the service that they start."""

import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from tests.processes import PATIENCE_SECONDS, ROOT, serving

ADDRESS = "http://127.0.0.1:8000"
"""Of the service in the documents; a free port stands in for it."""
_SERVE = {"make serve": "stridevit serve --repository models"}
"""What a target of the Makefile runs, without setting up an environment first; a test compares them."""

_TOKEN = re.compile(
    r"(?P<any>\.\.\.)|(?P<space>\s+)|(?P<id>\b[0-9a-f]{32}\b)|(?P<number>(?<![\w.-])\d[\d.,]*(?:e-?\d+)?)"
)
_ANY = {"any": ".*?", "space": r"\s*", "id": "[0-9a-f]{32}", "number": r"\d[\d.,]*(?:e-?\d+)?"}


class Terminal:
    """A shell in `folder`. `environment` is that of the services that it starts."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self._folder, self._environment = folder, environment
        self._address = ADDRESS
        self._services = ExitStack()
        commands = folder / ".bin"
        commands.mkdir()
        (commands / ".curlrc").write_text("silent\nshow-error\n")  # no progress where no terminal is
        for name, module in (("python", ""), ("stridevit", "-m stridevit")):
            (commands / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
            (commands / name).chmod(0o755)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._services.close()

    def run(self, command: str) -> str | None:
        """What a command prints, on both outputs; None for a service, which stays. Raises AssertionError."""
        command = _SERVE.get(command.strip(), command)
        if command.startswith("stridevit serve"):
            self._serve(shlex.split(command)[2:])
            return None
        own = {
            "PATH": f"{self._folder / '.bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "NO_PROXY": "*",
            "COLUMNS": "500",
            "CURL_HOME": str(self._folder / ".bin"),
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("STRIDEVIT_")}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.replace(ADDRESS, self._address)],
            cwd=self._folder,
            env={**inherited, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=4 * PATIENCE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}\nended with {done.returncode}:\n{done.stdout[-3000:]}"
        return done.stdout.replace(self._address, ADDRESS)

    def _serve(self, arguments: list[str]) -> None:
        self._services.close()
        place = arguments.index("--repository")
        repository, others = arguments[place + 1], arguments[:place] + arguments[place + 2 :]
        service = [sys.executable, "-m", "service", *others]
        context = serving(self._folder / repository, command=service, environment=self._environment)
        self._address, _ = self._services.enter_context(context)


def commands(block: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with what the document says that it prints."""
    found: list[tuple[str, str]] = []
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        length = 1 + next((n for n, line in enumerate(lines) if not line.endswith("\\")), 0)
        found.append(("\n".join(lines[:length]), "\n".join(lines[length:]).strip()))
    return found


def matches(printed: str, documented: str) -> bool:
    """Whether an output is the documented one, but for numbers, request ids, white space, and what `...` stands for."""
    pattern, end = "", 0
    for token in _TOKEN.finditer(documented):
        pattern += re.escape(documented[end : token.start()]) + _ANY[str(token.lastgroup)]
        end = token.end()
    pattern += re.escape(documented[end:])
    return re.fullmatch(rf"\s*{pattern}\s*", printed, re.DOTALL) is not None
