"""The commands of README, Start and the tutorial run, and print what the documents say.

A block that is not run has `<!-- skip: next "why" -->` above it.
"""

import re
import shutil
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from sybil.typing import Parser

from tests.documentation.terminal import Terminal, commands, matches
from tests.processes import ROOT

FAST = [ROOT / "README.md", ROOT / "docs" / "index.md"]
TUTORIAL = ROOT / "docs" / "tutorial.md"
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="the documents ask with curl")


def run(page: Path, folder: Path, **environment: str) -> int:
    """Run every block of a page that is not skipped; how many that were."""
    with Terminal(folder, **environment) as terminal:

        def console(example: Example) -> None:
            for command, documented in commands(example.parsed):
                printed = terminal.run(command)
                assert not documented or printed is None or matches(printed, documented), (
                    f"{page.name}, line {example.line}: $ {command}\nprints\n{printed}\nthe page says\n{documented}"
                )

        def shell(example: Example) -> None:
            terminal.run(example.parsed)

        parsers: list[Parser] = [SkipParser(), CodeBlockParser("console", console), CodeBlockParser("sh", shell)]
        done = 0
        for example in Document.parse(str(page), *parsers).examples():
            try:
                example.evaluate()
            except SkipTest:
                continue
            done += example.region.parsed is not None and not isinstance(example.region.parsed, tuple)
    return done


@needs_curl
@pytest.mark.parametrize("page", FAST, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    for name in ("service", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    # One model is enough: the most accurate one, which answers for the family.
    assert run(page, tmp_path, STRIDEVIT_MODELS="cifar100-full-mha") > 0


@needs_curl
@pytest.mark.long
@pytest.mark.timeout(3000)  # it trains two models and compares them
def test_the_commands_of_the_tutorial_run(tmp_path: Path) -> None:
    assert run(TUTORIAL, tmp_path) > 0


@pytest.mark.parametrize("page", [*FAST, TUTORIAL], ids=lambda page: page.name)
def test_a_block_that_is_not_run_says_why(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"<!-*\s*skip:(?! next \"[^\"]+\" -->).*", text) == []
    # Other shells would be read past: every block of commands is one that the tests know.
    assert set(re.findall(r"^```(\w*)", text, flags=re.MULTILINE)) <= {"", "sh", "console", "python"}


def test_make_serve_runs_the_command_that_stands_for_it() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "exec $(SERVE)/bin/stridevit serve --repository models" in makefile


@pytest.mark.parametrize(
    ("printed", "documented", "same"),
    [
        ('{"label":"raccoon","probability":0.85}', '{"label":"raccoon",\n "probability":0.9123}', True),
        ("raccoon 0.8", "rocket 0.8", False),
        ("lsra-r4 answers", "lsra-r2 answers", False),
        ("top-1 96.0%, 179 images", "top-1 97.25%, 180 images", True),
        ("a\nb\nc", "a\n...\nc", True),
        ("a\nb", "a", False),
        ("id 566ac66d465044150000000000000001", "id 00000000465044150000000000000002", True),
    ],
)
def test_an_output_is_compared_but_for_its_numbers(printed: str, documented: str, same: bool) -> None:
    assert matches(printed, documented) is same


def test_a_command_that_fails_fails_the_test(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ ls none\n```\n")
    with pytest.raises(AssertionError, match="ended with 2"):
        run(page, tmp_path)


def test_an_output_that_is_not_the_documented_one_fails_the_test(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ echo raccoon\nrocket\n```\n")
    with pytest.raises(AssertionError, match="the page says"):
        run(page, tmp_path)
