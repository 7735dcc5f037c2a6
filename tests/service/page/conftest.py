"""The page in a real Chromium, against a real service with the shipped models."""

import importlib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.processes import ROOT, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SAMPLES = ROOT / "service" / "http" / "page" / "samples"
WAIT_MS = 120_000
"""How long a test waits for the page: longer than anything takes on a busy machine."""
EXPECTED_ERRORS = "Failed to load resource"
"""How Chromium notes every answer that is no 2xx; those are the subject of tests, not faults of the page."""

REQUIRED = os.environ.get("STRIDEVIT_BROWSER_TESTS") == "required"
if REQUIRED:
    # In CI nothing may skip these tests: the modules would, each by itself, without Playwright or axe.
    importlib.import_module("playwright.sync_api")
    importlib.import_module("axe_playwright_python.sync_playwright")

Opener = Callable[..., AbstractContextManager["Page"]]


# Until it is stopped, Playwright runs an event loop in this thread, where tests of other files could start none.
@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Debian's Chromium. Skips without it or without Playwright, unless STRIDEVIT_BROWSER_TESTS=required."""
    path = shutil.which("chromium")
    missing = [
        *([] if importlib.util.find_spec("playwright") else ["Playwright (pip install playwright)"]),
        *([] if path else ["Chromium (apt-get install chromium)"]),
    ]
    if missing:
        reason = f"needs {' and '.join(missing)}"
        assert not REQUIRED, reason
        pytest.skip(reason)
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=WAIT_MS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def service(browser: "Browser") -> Iterator[str]:
    """The base URL of a service with all shipped models, for all tests of a file."""
    with serving(ROOT / "models") as (url, _):
        yield url


@contextmanager
def opened(browser: "Browser", url: str, *, tolerated: str = EXPECTED_ERRORS, **options: Any) -> Iterator["Page"]:
    """A page of a fresh context. What the page throws, and what its policy forbids, fails the test at the end."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(WAIT_MS)
    faults: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(f"thrown: {error}"))
    page.on(
        "console",
        lambda message: (
            faults.append(message.text) if message.type == "error" and not message.text.startswith(tolerated) else None
        ),
    )
    page.on("request", lambda request: faults.append(request.url) if _foreign(request.url, url) else None)
    try:
        page.goto(url)
        yield page
        assert faults == []
    finally:
        context.close()


def leave_time(page: "Page") -> None:
    """Plans are those for a deadline that no stall comes near, whatever deadline the page asks for."""
    page.route(
        "**/plan?*",
        lambda route: route.continue_(url=re.sub(r"deadline_ms=[\d.]+", "deadline_ms=120000", route.request.url)),
    )


def hold(page: "Page", pattern: str) -> list["Route"]:
    """Keep requests back, from now on: those that the page has sent, for the test to let go."""
    held: list[Route] = []

    def keep(route: "Route") -> None:
        held.append(route)

    page.route(pattern, keep)
    return held


def until(page: "Page", condition: str) -> None:
    """Wait for a condition in JavaScript. Playwright's own way needs `eval`, which the page's policy forbids."""
    page.evaluate(f"async () => {{ while (!({condition})) await new Promise(requestAnimationFrame); }}")


def _foreign(requested: str, url: str) -> bool:
    origin = "/".join(url.split("/")[:3])
    return not requested.startswith((f"{origin}/", "data:", "blob:"))


@pytest.fixture
def open_page(browser: "Browser", service: str) -> Opener:
    """Open the page at a hash, with options of a browser context."""

    def opener(fragment: str = "", **options: Any) -> AbstractContextManager["Page"]:
        return opened(browser, f"{service}/{fragment}", **options)

    return opener


@pytest.fixture
def screenshots() -> Path | None:
    """Where pictures for README and docs go: the folder that STRIDEVIT_SCREENSHOTS names."""
    named = os.environ.get("STRIDEVIT_SCREENSHOTS")
    if not named:
        return None
    folder = Path(named)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
