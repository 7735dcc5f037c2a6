"""Every state of the page under axe, in light and dark, wide and narrow; and the pictures for the documents."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.service.page.conftest import SAMPLES, Opener, leave_time, until

pytest.importorskip("playwright", reason="needs Playwright (pip install playwright)")
pytest.importorskip("axe_playwright_python", reason="needs axe (pip install axe-playwright-python)")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.service.page.compare_page import answered, choose

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.slow, pytest.mark.browser]

State = Callable[["Page"], object]


def empty(page: "Page") -> None:
    expect(page.locator("tr[data-model]").first).to_be_visible()


def compared(page: "Page") -> None:
    page.click("[data-sample=raccoon]")
    answered(page)


def unfolded(page: "Page") -> None:
    compared(page)
    page.locator(".top").first.click()
    page.locator(".unfold").first.click()
    page.click("text=Copy as curl")


def broken(page: "Page") -> None:
    choose(page, name="broken.jpg", content=(SAMPLES / "rocket.jpg").read_bytes()[:3000])
    expect(page.locator("#notice")).to_be_visible()


def wants_key(page: "Page") -> None:
    """The form, as the service's 401 brings it up."""
    page.evaluate("async () => { void (await import('./page/parts/key.js')).askForKey(null, null); }")
    expect(page.locator("#key-form")).to_be_visible()


def tokens(page: "Page") -> None:
    compared(page)
    page.click("a[href^='#tokens']")
    page.check("#tokens-cifar100-csra-r2")
    expect(page.locator(".cell.painted").first).to_be_attached()


def tokens_in_runs(page: "Page") -> None:
    tokens(page)
    page.check("#tokens-cifar100-lsra-r4")
    expect(page.locator(".cell.painted").first).to_be_attached()


def tokens_with_gaps(page: "Page") -> None:
    tokens(page)
    page.check("#tokens-cifar100-csra-r4")
    expect(page.locator(".explained")).to_contain_text("hatched")


def chosen(page: "Page") -> None:
    page.click("a[href^='#choose']")
    expect(page.locator("#rungs .rung").first).to_be_visible()


def loaded(page: "Page") -> None:
    chosen(page)
    page.fill("#rate", "80")
    page.click("#load-start")
    expect(page.locator("#load")).to_contain_text("ended after")
    expect(page.locator("#outcome table")).to_be_visible()


def live(page: "Page") -> None:
    compared(page)
    page.click("a[href^='#live']")
    expect(page.locator("#chart-rate canvas")).to_be_visible()
    # Something to see: all models busy for as long as it takes them.
    page.evaluate(
        """async () => {
          const picture = await (await fetch('page/samples/rocket.jpg')).blob();
          const models = (await (await fetch('v1/models')).json()).models.filter(model => model.state === 'ready');
          const names = ['cifar100', ...models.map(model => model.name)];
          const until = performance.now() + 25000;
          for (let turn = 0; turn < 400 && performance.now() < until; turn += 1) {
            const name = names[Math.floor(turn / 8) % names.length];
            await fetch(`v1/classify?model=${name}`, { method: 'POST', body: picture });
          }
        }"""
    )
    expect(page.locator("#live-models tbody tr")).not_to_have_count(0)


STATES: dict[str, State] = {
    "empty": empty,
    "compare": compared,
    "unfolded": unfolded,
    "broken": broken,
    "key": wants_key,
    "tokens": tokens,
    "tokens-lsra": tokens_in_runs,
    "tokens-gaps": tokens_with_gaps,
    "choose": chosen,
    "load": loaded,
    "live": live,
}
SHOWN = ("compare", "tokens", "load", "live")
"""The states that the documents show."""
WIDTHS = (1280, 380)
"""Of the window in CSS pixels, wide and narrow."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", STATES)
def test_a_state_has_no_violations_and_no_sideways_scrolling(
    state: str, scheme: str, open_page: Opener, screenshots: Path | None
) -> None:
    with open_page("#compare?deadline=200", color_scheme=scheme, reduced_motion="reduce") as page:
        page.set_viewport_size({"width": WIDTHS[0], "height": 900})
        STATES[state](page)
        if screenshots and state == "compare":
            expect(page.locator("#verdict .choice")).to_contain_text("chooses")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            # Charts take their new width with the next frames.
            until(page, f"document.documentElement.scrollWidth <= {width}")
            results = Axe().run(page)
            assert results.violations_count == 0, f"{width} px: {results.generate_report()}"
            assert page.evaluate("getComputedStyle(document.querySelector('h1')).display") != "inline", (
                "styles are there"
            )
            if screenshots and state in SHOWN and (width == WIDTHS[0] or state == "compare"):
                save(page.screenshot(full_page=True), screenshots / f"{state}-{scheme}-{width}.png")


def save(screenshot: bytes, path: Path) -> None:
    """With a palette: half the bytes, and no difference to be seen on a page of few colours."""
    with Image.open(io.BytesIO(screenshot)) as picture:
        picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            path, optimize=True
        )


def stop_redrawing(page: "Page", tab: str) -> None:
    """What is drawn anew, once a second or when the choice is there, loses its focus."""
    if tab == "compare":
        leave_time(page)
        page.reload()
        expect(page.locator("#verdict .choice a")).to_be_visible()
    elif tab in ("choose", "live"):
        page.route("**/v1/**", lambda _: None)
        # All that was asked before it is drawn by then.
        with page.expect_request(re.compile("v1/")):
            pass


@pytest.mark.parametrize("tab", ["compare", "tokens", "choose", "live"])
def test_everything_is_reached_by_tab_and_shows_that_it_has_the_focus(tab: str, open_page: Opener) -> None:
    with open_page(f"#{tab}") as page:
        ready = {"compare": "tr[data-model]", "tokens": "#keys", "choose": "#load-start", "live": "#tiles .tile"}
        expect(page.locator(ready[tab]).first).to_be_visible()
        stop_redrawing(page, tab)
        wanted = page.evaluate(
            """() => [...document.querySelectorAll('a, button, input, select, summary, [tabindex="0"]')]
              .filter(element => element.checkVisibility() && !element.disabled)
              .map((element, index) => { element.dataset.stop = index; return element; })
              // Of radio buttons the group is one stop.
              .filter(element => element.type !== 'radio' || element.checked)
              .map(element => element.dataset.stop)"""
        )
        reached: set[str] = set()
        for _ in range(len(wanted) + 3):
            page.keyboard.press("Tab")
            stop, outlined = page.evaluate(
                """() => {
                  const element = document.activeElement;
                  const label = element.parentElement.querySelector(`label[for=${element.id || 'none'}]`);
                  const shown = element.classList.contains('unseen') ? label : element;
                  const { outlineStyle, outlineWidth } = getComputedStyle(shown);
                  return [element.dataset.stop ?? null, outlineStyle !== 'none' && parseFloat(outlineWidth) >= 2];
                }"""
            )
            if stop is not None:
                reached.add(stop)
                assert outlined, page.evaluate("document.activeElement.outerHTML")
        assert reached == set(wanted)
