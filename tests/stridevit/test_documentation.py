"""What the documentation names exists: commands and their flags, targets of the Makefile, links, files and folders."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from stridevit.command import COMMANDS
from tests.processes import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
page = pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `stridevit ...`, in a block of code or in backticks; without comments and what is piped on."""
    text = text.replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"```(?:sh|console)\n(.*?)```", text, flags=re.DOTALL))
    lines = re.findall(r"^(?:\$ )?stridevit (.*)", blocks, flags=re.MULTILINE)
    for line in [*lines, *re.findall(r"`stridevit ([^`|]+)`", text)]:
        yield shlex.split(line.split(" > ")[0], comments=True)


@page
def test_every_command_and_flag_that_a_page_names_exists(file: Path) -> None:
    for words in commands(file.read_text(encoding="utf-8")):
        if words[0] in ("...", "--help", "--version") or {"X", "COMMAND"} & set(words):  # placeholders
            continue
        assert words[0] in COMMANDS, words
        command = COMMANDS[words[0]].load()
        rest = words[1:]
        if hasattr(command, "commands") and rest and rest[0] != "--help":
            assert rest[0] in command.commands, words
            command, rest = command.commands[rest[0]], rest[1:]
        known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert flags <= known | {"--help"}, words


@page
def test_every_target_that_a_page_names_exists(file: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", file.read_text(encoding="utf-8"))) <= targets


@page
def test_every_link_to_a_file_leads_somewhere(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
    assert [link for link in links if not (file.parent / link).exists()] == []


@page
def test_every_heading_that_a_link_names_exists(file: Path) -> None:
    """By GitHub's rule: what is neither letter, digit, hyphen nor space goes, and spaces become hyphens."""
    text = file.read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\(([^)#:]*\.md|)#([^)]+)\)", text):
        target = (file.parent / link).read_text(encoding="utf-8") if link else text
        headings = re.findall(r"^#+ (.+)$", target, flags=re.MULTILINE)
        there = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in there, f"{link}#{anchor}"


@page
def test_every_test_that_a_page_names_exists(file: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", file.read_text(encoding="utf-8")))
    there = {
        name
        for tests in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", tests.read_text(encoding="utf-8"))
    }
    assert named - there == set()


def test_every_file_that_the_architecture_names_exists() -> None:
    named = re.findall(
        r"`((?:training|export|service|loadtests|stridevit|tests)/[\w/.]*)`", (ROOT / "CONTRIBUTING.md").read_text()
    )
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
