"""`python -m tests.documentation.site SITE`: checks a built site, after `zensical build --strict`, in HTML.

Zensical checks links between Markdown pages. What it does not: links to other files, images, what the theme adds, pages
that the navigation forgets, and whether a page loads anything from another host. Needs the standard library alone.
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {
    *((tag, "src") for tag in ("img", "script", "iframe", "source", "video", "audio", "embed")),
    *((tag, "href") for tag in ("link", "image", "use")),
    ("object", "data"),
    ("form", "action"),
}
"""What a browser fetches by itself, or where it sends a form."""
NOT_FETCHED = {"canonical", "alternate", "prev", "next"}
"""`rel` of links that name a page and load nothing."""
FOREIGN = re.compile(r"^(?:https?:)?//")
IN_STYLE = re.compile(r"""(?:url\(\s*['"]?|@import\s+['"])((?:https?:)?//[^'")\s]+)""")


class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = IN_STYLE.findall(html)
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what an element names."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        for name in ("href", "src", "data", "action"):
            value = given.get(name)
            if value and (tag, name) in LOADED and not NOT_FETCHED & set(given.get("rel", "").split()):
                self.loads.append(value)
            elif value and (tag, name) == ("a", "href"):
                self.links.append(value)


def problems(site: Path, repository: Path) -> Iterator[str]:
    """One line for each fault of the site. A link may lead to a file of the repository, in which it lies."""
    files = sorted(site.rglob("*.html"))
    pages = {file.resolve(): Page(file.read_text(encoding="utf-8")) for file in files}
    home = pages.get((site / "index.html").resolve())
    if home is None:
        yield "index.html: missing"
    linked = {target for target, _ in _targets(site / "index.html", home.links if home else [])}
    for file, page in pages.items():
        name = file.relative_to(site.resolve())
        for loaded in page.loads:
            if FOREIGN.match(loaded):
                yield f"{name}: loads {loaded} from another host"
        if name.name == "404.html":  # its links are absolute: it is served in place of any page
            continue
        for target, link in _targets(file, [*page.links, *page.loads]):
            anchor = unquote(urlsplit(link).fragment)
            if not target.exists() or not target.is_relative_to(repository.resolve()):
                yield f"{name}: {link} leads nowhere"
            elif anchor and target in pages and anchor not in pages[target].anchors:
                yield f"{name}: {link} names no anchor of that page"
        if len(name.parts) == 1 and file not in linked and name.name != "index.html":
            yield f"{name}: not in the navigation"
    for style in site.rglob("*.css"):
        for loaded in IN_STYLE.findall(style.read_text(encoding="utf-8")):
            yield f"{style.relative_to(site)}: loads {loaded} from another host"


def _targets(file: Path, links: list[str]) -> Iterator[tuple[Path, str]]:
    """The file that each link within the site or the repository leads to."""
    for link in links:
        parts = urlsplit(link)
        if not parts.scheme and not parts.netloc:
            yield ((file.parent / unquote(parts.path)).resolve() if parts.path else file.resolve()), link


def main() -> None:
    """Print the faults; exit with 1 if there are any."""
    site = Path(sys.argv[1])
    found = list(problems(site, Path.cwd()))
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
