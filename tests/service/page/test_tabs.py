"""Tokens, Choose and Live in a browser."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.processes import ROOT, get, post, serving
from tests.service.page.conftest import SAMPLES, WAIT_MS, Opener, hold, opened, until

pytest.importorskip("playwright", reason="needs Playwright (pip install playwright)")
pytest.importorskip("axe_playwright_python", reason="needs axe (pip install axe-playwright-python)")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.service.page.compare_page import answered

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.browser]


def reference(variant: str, rate: int, side: int) -> list[list[int]]:
    """What each key and value is made from, by a slow and obvious loop over patches."""
    if variant == "mha":
        return [[patch] for patch in range(side * side)]
    if variant == "lsra":
        return [list(range(first, min(first + rate, side * side))) for first in range(0, side * side, rate)]
    windows = []
    for top in range(0, side, rate):
        for left in range(0, side, rate):
            window = []
            for row in (top - 1, top, top + 1):
                for column in (left - 1, left, left + 1):
                    if 0 <= row < side and 0 <= column < side:
                        window.append(row * side + column)
            windows.append(window)
    return windows


@pytest.mark.parametrize("side", [3, 7, 8, 24])
@pytest.mark.parametrize(
    ("variant", "rate"), [("mha", 1), ("csra", 2), ("csra", 4), ("lsra", 2), ("lsra", 3), ("lsra", 4)]
)
def test_windows_follow_from_the_manifest(variant: str, rate: int, side: int, geometry: "Page") -> None:
    expected = reference(variant, rate, side)
    attention = {
        "tokens": side * side,
        "kv_tokens": len(expected),
        "stride": rate if variant == "csra" else None,
        "block_size": rate if variant == "lsra" else None,
    }
    script = "async ([attention, side]) => (await import('./page/tokens/windows.js')).layout(attention, side, side)"
    made = geometry.evaluate(script, [attention, side * 4])
    assert [window["patches"] for window in made["windows"]] == expected
    if variant == "csra":
        assert len(expected) == math.ceil(side / rate) ** 2
    attention["kv_tokens"] = len(expected) + 1
    with pytest.raises(Exception, match="windows where the model has"):
        geometry.evaluate(script, [attention, side * 4])


@pytest.fixture(scope="module")
def geometry(browser: Any, service: str) -> Any:
    context = browser.new_context()
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.goto(service)
    yield page
    context.close()


def test_tokens_are_gone_through_with_arrow_keys(open_page: Opener) -> None:
    with open_page("#tokens?model=cifar100-csra-r2&token=6") as page:
        keys = page.get_by_role("slider", name="Key and value")
        expect(keys).to_have_attribute("aria-valuenow", "6")
        for key, expected in (("ArrowDown", "10"), ("ArrowLeft", "9"), ("Home", "1"), ("ArrowUp", "1"), ("End", "16")):
            keys.press(key)
            expect(keys).to_have_attribute("aria-valuenow", expected)
        assert page.url.endswith("token=16")
        expect(page.locator("#selected-window")).to_contain_text("Token 16 of 16 is made from 9 patches")
        expect(page.locator(".patches .patch")).to_have_count(9)
        keys.press("Home")
        expect(page.locator(".patches .patch")).to_have_count(4)
        expect(page.locator("#selected-window")).to_contain_text("5 places beyond the edge")


def test_tokens_are_pointed_at_in_the_picture(open_page: Opener) -> None:
    with open_page("#compare?sample=rocket") as page:
        answered(page)
        page.click("text=Tokens")
        page.check("#tokens-cifar100-lsra-r4")
        picture = page.locator("svg.patches")
        assert (picture.locator("image").get_attribute("href") or "").startswith("data:image/png")
        box = picture.bounding_box()
        assert box
        page.mouse.move(box["x"] + box["width"] * 0.95, box["y"] + box["height"] * 0.95)
        expect(page.locator("#selected-window")).to_contain_text("Token 16 of 16 is made from 4 patches")
        page.mouse.move(box["x"] + box["width"] * 0.05, box["y"] + box["height"] * 0.05)
        expect(page.locator("#selected-window")).to_contain_text("Token 1 of 16")


def test_the_plan_is_the_service_s_own(service: str, open_page: Opener) -> None:
    with open_page("#choose?deadline=2000") as page:
        plan = get(f"{service}/v1/families/cifar100/plan?deadline_ms=2000").json()
        rungs = page.locator("#rungs .rung")
        expect(rungs).to_have_count(len(plan["rungs"]))
        assert rungs.evaluate_all("rungs => rungs.map(rung => rung.dataset.model)") == [
            rung["model"] for rung in plan["rungs"]
        ]
        expect(page.locator("#rungs .badge")).to_have_text("chosen")
        expect(page.locator("#chosen")).to_contain_text("Within 2.0 s the family cifar100 answers with")


def test_the_deadline_is_set_by_keys_and_kept_in_the_address(open_page: Opener) -> None:
    with open_page("#choose?deadline=50") as page:
        slider = page.get_by_role("slider", name="Deadline")
        slider.press("ArrowRight")
        slider.press("End")
        expect(slider).to_have_attribute("aria-valuetext", "2.0 s")
        assert "deadline=2000" in page.url
        slider.press("Home")
        expect(slider).to_have_attribute("aria-valuetext", "5 ms")
        page.reload()
        expect(page.get_by_role("slider", name="Deadline")).to_have_attribute("aria-valuetext", "5 ms")
        page.click("a[href^='#compare']")
        expect(page.locator(".choice")).to_contain_text("a deadline of 5 ms")


def test_a_load_asks_both_and_counts_every_answer(open_page: Opener) -> None:
    with open_page("#choose?rate=10&deadline=2000") as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url) if "v1/classify" in request.url else None)
        page.click("#load-start")
        expect(page.locator("#load-start")).to_have_text("Stop")
        expect(page.locator("#load-start")).to_have_text("Start")
        expect(page.locator("#load")).to_contain_text("ended after")
        # One that no connection took before its deadline is not sent.
        assert 0 < sum("model=cifar100&" in url for url in asked) <= 100
        assert 0 < sum("model=cifar100-full-mha&" in url for url in asked) <= 100
        rows = page.locator("#outcome tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
        )
        for _, due, in_time, late, refused, *_ in rows:
            assert int(due) == 100
            assert int(in_time.split()[0]) + int(late) + int(refused) == 100


def test_a_load_keeps_few_requests_open_and_what_waits_too_long_is_late(open_page: Opener) -> None:
    with open_page("#choose?rate=50&deadline=100") as page:
        held = hold(page, "**/v1/classify*")
        page.click("#load-start")
        expect(page.locator("#outcome tbody tr").first.locator("td").nth(2)).not_to_have_text("0")
        while len(held) < 5:
            page.evaluate("() => new Promise(requestAnimationFrame)")
        deadlines = [float(re.findall(r"deadline_ms=([\d.]+)", route.request.url)[0]) for route in held]
        assert len(held) == 5
        page.click("#load-start")
        assert all(0 < deadline <= 100 for deadline in deadlines)


def test_a_load_stops_when_the_tab_is_hidden(open_page: Opener) -> None:
    with open_page("#choose?rate=20&deadline=2000") as page:
        page.click("#load-start")
        expect(page.locator("#outcome td").first).to_be_attached()
        hide(page, hidden=True)
        expect(page.locator("#load-start")).to_have_text("Start")
        expect(page.locator("#load")).to_contain_text("stopped: the tab was hidden")
        page.click("#load-start")
        hide(page, hidden=False)
        page.click("a[href^='#live']")
        page.click("a[href^='#choose']")
        expect(page.locator("#load-start")).to_have_text("Start")


def test_live_is_the_status_once_a_second_and_nothing_while_hidden(service: str, open_page: Opener) -> None:
    with open_page("#compare?sample=rocket") as page:
        answered(page)
        page.click("a[href^='#live']")
        expect(page.locator("#live-models tbody tr")).to_have_count(
            sum(model["state"] == "ready" for model in get(f"{service}/v1/status").json()["models"])
        )
        expect(page.locator("#tiles")).to_contain_text("images per second")
        row = page.locator("#live-models tbody tr").first.inner_text()
        assert re.search(r"\d", row)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        with page.expect_request(re.compile("v1/status")):
            pass
        hide(page, hidden=True)
        asked.clear()
        with open_page("#live") as other:
            for _ in range(4):
                with other.expect_request(re.compile("v1/status")):
                    pass
        assert asked == []
        with page.expect_request(re.compile("v1/status")):
            hide(page, hidden=False)


def test_live_shows_what_a_model_on_trial_has_answered(browser: "Browser", tmp_path: Path) -> None:
    for name in ("cifar100-csra-r2", "cifar100-csra-r4"):
        (tmp_path / name).symlink_to(ROOT / "models" / name)
    shadow = {"STRIDEVIT_SHADOW": "cifar100-csra-r2:cifar100-csra-r4=100%"}
    with serving(tmp_path, environment=shadow) as (url, _), opened(browser, f"{url}/#live") as page:
        row = page.locator("#live-rollouts tbody tr")
        expect(row).to_contain_text("Shadow cifar100-csra-r4 for cifar100-csra-r2")
        assert (
            post(f"{url}/v1/classify?model=cifar100-csra-r2", (SAMPLES / "rocket.jpg").read_bytes()).status_code == 200
        )
        expect(row).to_contain_text(re.compile(r"(100\.0|0\.0) % of 1"))
        for width in (1280, 380):
            page.set_viewport_size({"width": width, "height": 900})
            until(page, f"document.documentElement.scrollWidth <= {width}")
            results = Axe().run(page)
            assert results.violations_count == 0, results.generate_report()


def hide(page: "Page", *, hidden: bool) -> None:
    """What a browser does when another tab comes to the front."""
    page.evaluate(
        """hidden => {
          Object.defineProperty(document, 'hidden', { configurable: true, get: () => hidden });
          document.dispatchEvent(new Event('visibilitychange'));
        }""",
        hidden,
    )


def test_a_tab_that_could_not_be_loaded_says_so_and_loads_when_tried_again(open_page: Opener) -> None:
    with open_page("#compare") as page:
        broken = [True]
        page.route("**/page/choose/tab.js", lambda route: route.abort() if broken else route.continue_())
        page.click("a[href^='#choose']")
        expect(page.locator("#notice")).to_contain_text("The tab choose could not be loaded")
        page.click("a[href^='#live']")
        expect(page.locator("#tiles .tile").first).to_be_visible()
        expect(page.locator("#notice")).to_be_hidden()
        page.click("a[href^='#choose']")
        expect(page.locator("#notice")).to_be_visible()
        broken.clear()
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#rungs .rung").first).to_be_visible()
        expect(page.locator("#notice")).to_be_hidden()
