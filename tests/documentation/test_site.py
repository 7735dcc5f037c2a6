"""The check of the built site finds what it is for. `make docs` builds the real one."""

import re
from pathlib import Path

import pytest

from tests.documentation.site import problems
from tests.processes import ROOT

PAGE = '<link rel="stylesheet" href="style.css"><h1 id="top">A page</h1>{}'


def site(folder: Path, **bodies: str) -> Path:
    """A site in a repository, whose home links to every page."""
    built = folder / "site"
    built.mkdir()
    links = "".join(f'<a href="{name}.html">{name}</a>' for name in bodies)
    for name, body in {"index": links, **bodies}.items():
        (built / f"{name}.html").write_text(PAGE.format(body))
    (built / "style.css").write_text("body { color: black }")
    (folder / "LICENSE").write_text("a file of the repository")
    return built


def test_a_site_without_faults_has_none(tmp_path: Path) -> None:
    body = '<a href="b.html#top">b</a> <a href="#top">up</a> <a href="../LICENSE">licence</a> <a href="https://a.org">a</a>'
    assert list(problems(site(tmp_path, a=body, b=""), tmp_path)) == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="c.html">c</a>', "a.html: c.html leads nowhere"),
        ('<a href="../TODO">c</a>', "a.html: ../TODO leads nowhere"),
        ('<a href="../../etc">c</a>', "a.html: ../../etc leads nowhere"),
        ('<img src="none.svg">', "a.html: none.svg leads nowhere"),
        ('<a href="b.html#none">b</a>', "a.html: b.html#none names no anchor of that page"),
        ('<img src="https://a.org/b.png">', "a.html: loads https://a.org/b.png from another host"),
        ('<script src="//a.org/b.js"></script>', "a.html: loads //a.org/b.js from another host"),
        ('<link rel="preconnect" href="https://fonts.org">', "a.html: loads https://fonts.org from another host"),
        ("<style>p { background: url('https://a.org/b') }</style>", "a.html: loads https://a.org/b from another host"),
        ('<img srcset="https://a.org/b.png 2x">', "a.html: loads https://a.org/b.png from another host"),
    ],
)
def test_a_fault_of_a_page_is_named(tmp_path: Path, body: str, problem: str) -> None:
    assert list(problems(site(tmp_path, a=body, b=""), tmp_path)) == [problem]


def test_a_page_that_the_navigation_forgets_is_named(tmp_path: Path) -> None:
    built = site(tmp_path, a="")
    (built / "b.html").write_text(PAGE.format(""))
    assert list(problems(built, tmp_path)) == ["b.html: not in the navigation"]


def test_a_style_that_loads_from_another_host_is_named(tmp_path: Path) -> None:
    built = site(tmp_path, a="")
    (built / "style.css").write_text('@import "https://a.org/b.css";')
    assert list(problems(built, tmp_path)) == ["style.css: loads https://a.org/b.css from another host"]


def test_the_navigation_has_every_page_of_the_folder_and_no_other() -> None:
    """Without building: a page that is missing, or was added and forgotten."""
    listed = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(file.name for file in (ROOT / "docs").glob("*.md"))
