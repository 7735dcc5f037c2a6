"""What the page shows follows the address and the latest click, whatever comes in which order."""

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.processes import get
from tests.service.page.conftest import Opener, hold, until

pytest.importorskip("playwright", reason="needs Playwright (pip install playwright)")

from playwright.sync_api import expect

from tests.service.page.compare_page import answered, verdict

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.slow, pytest.mark.browser]


def go(page: "Page", fragment: str) -> None:
    """What a link, a bookmark or the history does."""
    page.evaluate("fragment => { location.hash = fragment; }", fragment)


def test_the_address_is_followed_within_a_tab(open_page: Opener) -> None:
    with open_page("#choose?deadline=50") as page:
        slider = page.get_by_role("slider", name="Deadline")
        slider.press("End")
        go(page, "#choose?deadline=100")
        expect(slider).to_have_attribute("aria-valuetext", "100 ms")
        expect(page.locator("#chosen")).to_contain_text("Within 100 ms")
        go(page, "#compare?sample=raccoon")
        answered(page)
        assert verdict(page) == "raccoon"
        go(page, "#compare?sample=rocket")
        expect(page.locator("#verdict .answer strong")).to_have_text("rocket")
        page.go_back()
        expect(page.locator("#verdict .answer strong")).to_have_text("raccoon")
        for model in ("cifar100-lsra-r2", "cifar100-csra-r4"):
            go(page, f"#tokens?model={model}")
            expect(page.locator(f"#tokens-{model}")).to_be_checked()


def test_a_link_to_a_token_shows_it_and_its_picture(open_page: Opener) -> None:
    with open_page("#tokens?model=cifar100-csra-r2&token=1&sample=rocket") as page:
        expect(page.locator("#selected-window")).to_contain_text("Token 1 of 16")
        expect(page.locator(".patches image")).to_have_attribute("href", re.compile("rocket"))
        page.locator("#keys").press("ArrowRight")
        assert "token=2" in page.url
        page.reload()
        expect(page.locator("#selected-window")).to_contain_text("Token 2 of 16")


def test_links_between_tabs_keep_what_is_shown(open_page: Opener) -> None:
    with open_page("#compare?sample=rocket&deadline=500") as page:
        answered(page)
        page.click("text=See how")
        expect(page.locator("#chosen")).to_contain_text("Within 500 ms")
        assert "sample=rocket" in page.url


def test_answers_stay_while_another_tab_is_shown(open_page: Opener) -> None:
    with open_page("#compare?sample=rocket") as page:
        before = answered(page)
        # This tab reads the list of models again.
        page.click("a[href^='#choose']")
        expect(page.locator("#rungs .rung").first).to_be_visible()
        page.click("a[href^='#compare']")
        expect(page.locator("#compare")).to_be_visible()
        expect(page.locator(".choice")).to_contain_text("cifar100")
        assert answered(page) == before != {}


def test_the_skip_link_stays_on_its_tab(open_page: Opener) -> None:
    with open_page("#live") as page:
        expect(page.locator("#tiles .tile").first).to_be_visible()
        page.locator("#skip").press("Enter")
        until(page, "document.activeElement.id === 'main'")
        expect(page.locator("#live")).to_be_visible()
        assert page.url.endswith("#live")


def test_of_two_samples_the_one_clicked_last_is_shown(open_page: Opener) -> None:
    with open_page() as page:
        held = hold(page, "**/samples/grace_hopper.jpg")
        with page.expect_request(re.compile("grace_hopper")):
            page.click("[data-sample=grace_hopper]")
        page.click("[data-sample=rocket]")
        answered(page)
        for route in held:
            route.continue_()
        page.evaluate(
            "async () => { for (let turn = 0; turn < 30; turn += 1) await new Promise(requestAnimationFrame); }"
        )
        assert "sample=rocket" in page.url
        assert verdict(page) == "rocket"


def test_a_second_click_on_start_is_no_second_load(open_page: Opener) -> None:
    with open_page("#choose?rate=10&deadline=2000") as page:
        expect(page.locator("#load-start")).to_be_visible()
        page.evaluate("() => { const start = document.querySelector('#load-start'); start.click(); start.click(); }")
        expect(page.locator("#load-start")).to_have_text("Stop")
        page.click("#load-start")
        expect(page.locator("#load-start")).to_have_text("Start")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url) if "classify" in request.url else None)
        for _ in range(3):
            with page.expect_request(re.compile("/plan")):
                pass
        assert asked == []


def test_a_load_that_can_only_fail_stops_and_says_why(open_page: Opener) -> None:
    with open_page("#choose?rate=10&deadline=2000") as page:
        problem = {
            "type": "about:blank",
            "title": "Forbidden",
            "status": 403,
            "detail": "no scope",
            "code": "forbidden",
        }
        page.route("**/v1/classify*", lambda route: route.fulfill(status=403, json=problem))
        page.click("#load-start")
        expect(page.locator("#load")).to_contain_text("stopped by an error")
        expect(page.locator("#notice")).to_contain_text("No scope")


def test_a_model_that_no_longer_serves_is_not_waited_for(open_page: Opener) -> None:
    with open_page() as page:
        expect(page.locator("tr[data-model=cifar100-mha]")).to_be_visible()
        prediction = {"index": 69, "label": "rocket", "probability": 0.9}
        timings = {"read": 1, "decode": 1, "queue": 1, "inference": 1, "total": 5}
        events = [
            {
                "event": "answer",
                "model": "cifar100-mha",
                "version": 4,
                "predictions": [prediction],
                "timings_ms": timings,
            },
            {"event": "end", "request_id": "a", "agreement": {"model": "cifar100-mha", "of": 0, "agree": 0}},
        ]
        body = "".join(f"{json.dumps(event)}\n" for event in events)
        page.route("**/v1/compare*", lambda route: route.fulfill(body=body))
        page.click("[data-sample=rocket]")
        answered(page)
        expect(page.locator("tr[data-model=cifar100-csra-r2]")).to_contain_text("it no longer serves")
        expect(page.locator("tr[data-model=cifar100-mha] .agreement")).to_have_count(0)


def test_a_family_that_has_changed_is_shown_anew(service: str, open_page: Opener) -> None:
    with open_page("#choose") as page:
        options = page.locator("#fixed option")
        expect(page.locator("#rungs .rung").first).to_be_visible()
        before = options.count()
        listed = get(f"{service}/v1/models").json()
        left = [model for model in listed["models"] if model["name"] != "cifar100-full-mha"]
        page.route("**/v1/models", lambda route: route.fulfill(json={**listed, "models": left}))
        page.click("a[href^='#live']")
        expect(page.locator("#tiles .tile").first).to_be_visible()
        page.click("a[href^='#choose']")
        expect(options).to_have_count(before - 1)
        assert "full-mha" not in page.locator("#fixed").input_value()


def test_percentiles_of_few_answers_are_not_shown(service: str, open_page: Opener) -> None:
    status = get(f"{service}/v1/status").json()
    ready = [model for model in status["models"] if model["state"] == "ready"]
    times = {"p50_ms": 5, "p95_ms": 8, "p99_ms": 9}
    # Of 19 and of 20 answers.
    measured = [{**model, **times, "images_per_s": rate} for model, rate in zip(ready, (1.9, 2.0), strict=False)]
    with open_page() as page:
        page.route("**/v1/status", lambda route: route.fulfill(json={**status, "window_s": 10, "models": measured}))
        go(page, "#live")
        rows = page.locator("#live-models tbody tr")
        for row, expected in enumerate((["5 ms", "–", "–"], ["5 ms", "8 ms", "9 ms"])):
            for column, text in enumerate(expected, start=2):
                expect(rows.nth(row).locator("td").nth(column)).to_have_text(text)
