"""Compare in a browser: every way to give a picture, and everything that may go wrong with it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.processes import ROOT, get, serving
from tests.service.conftest import encoded
from tests.service.page.conftest import SAMPLES, Opener, leave_time, opened, until

pytest.importorskip("playwright", reason="needs Playwright (pip install playwright)")

from playwright.sync_api import expect

from tests.service.page.compare_page import answered, choose, hand_over, seen_pixels, verdict

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.slow, pytest.mark.browser]

NAMES = {"raccoon": "raccoon", "rocket": "rocket", "grace_hopper": "woman"}


def ready_models(service: str) -> list[str]:
    return [model["name"] for model in get(f"{service}/v1/models").json()["models"] if model["state"] == "ready"]


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_named_rightly_by_every_model(name: str, service: str, open_page: Opener) -> None:
    with open_page() as page:
        page.click(f"[data-sample={name}]")
        assert answered(page) == dict.fromkeys(ready_models(service), NAMES[name])
        assert verdict(page) == NAMES[name]
        seen = seen_pixels(page)
        assert (seen["width"], seen["height"], seen["rendering"]) == (32, 32, "pixelated")
        assert page.url.endswith(f"#compare?sample={name}")


def test_the_address_brings_the_same_sample_back(open_page: Opener) -> None:
    with open_page("#compare?sample=rocket") as page:
        assert verdict_when_answered(page) == "rocket"


def test_rows_say_what_each_model_costs_beside_the_chosen_one(service: str, open_page: Opener) -> None:
    with open_page("#compare?sample=rocket&deadline=2000") as page:
        leave_time(page)
        page.reload()
        answered(page)
        best = get(f"{service}/v1/models").json()["families"]["cifar100"][0]
        row = page.locator(f"tr[data-model={best}]")
        expect(row.locator(".badge")).to_have_text("chosen")
        expect(page.locator(".choice")).to_contain_text("its most accurate model")
        other = page.locator("tr[data-model=cifar100-mha]")
        assert "64" in other.inner_text()
        assert "0.81\u00a0M" in other.inner_text()
        assert "51.6 %" in other.inner_text()
        assert " pt" in other.inner_text()
        expect(other).to_contain_text("MB", use_inner_text=True)
        assert "decode" in (other.locator(".stages").get_attribute("aria-label") or "")
        other.locator(".top").click()
        expect(page.locator("#top5-cifar100-mha li")).to_have_count(5)


def test_a_service_that_refuses_is_asked_again_whether_it_still_does(service: str, open_page: Opener) -> None:
    plan = get(f"{service}/v1/families/cifar100/plan?deadline_ms=60000").json()
    assert plan["in_time"], plan
    plans = iter([{**plan, "in_time": False}, {**plan, "in_time": False}, plan])
    with open_page("") as page:
        page.route("**/plan?*", lambda route: route.fulfill(json=next(plans, plan)))
        page.goto(f"{service}/#compare?again")
        page.reload()
        expect(page.locator("#verdict .choice")).to_contain_text("chooses")
        assert next(plans, None) is None


def test_other_precisions_are_folded_under_their_model(open_page: Opener) -> None:
    with open_page() as page:
        folded = page.locator("tr[data-model=cifar100-mha-int8]")
        expect(folded).to_be_hidden()
        page.get_by_role("button", name="int8 of cifar100-mha").press("Enter")
        expect(folded).to_be_visible()
        previous = folded.evaluate("row => row.parentElement.firstElementChild.dataset.model")
        assert previous == "cifar100-mha"


@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PNG"])
def test_an_upload_is_shown_as_the_models_see_it(kind: str, open_page: Opener) -> None:
    """Browsers show no TIFF, and do not crop: the picture comes back from the service."""
    picture = Image.new("RGB", (90, 60), "red")
    picture.paste((0, 0, 255), (15, 0, 75, 60))
    with open_page() as page:
        choose(page, name=f"picture.{kind.lower()}", content=encoded(picture, kind), kind=f"image/{kind.lower()}")
        assert len(answered(page)) > 1
        red, green, blue = seen_pixels(page)["mean"]
        assert blue > 240
        assert red < 15, "the middle was cropped"
        assert green < 15


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(event: str, open_page: Opener) -> None:
    with open_page() as page:
        expect(page.locator("tr[data-model=cifar100-mha]")).to_be_visible()
        content = (SAMPLES / "rocket.jpg").read_bytes()
        hand_over(page, event, name="rocket.jpg", content=content, kind="image/jpeg")
        answered(page)
        assert verdict(page) == "rocket"


def test_a_broken_file_is_explained_once(open_page: Opener) -> None:
    with open_page("#compare?sample=rocket") as page:
        answered(page)
        choose(page, name="broken.jpg", content=(SAMPLES / "rocket.jpg").read_bytes()[:3000])
        notice = page.locator("#notice")
        expect(notice).to_contain_text("This file cannot be read.")
        assert page.locator("text=damaged").count() <= 1
        expect(page.locator(".top")).to_have_count(0)
        expect(page.locator("#seen img")).to_have_count(0)
        choose(page, name="text.txt", content=b"no picture at all", kind="text/plain")
        expect(notice).to_contain_text("This is no picture")
        page.click("[data-sample=raccoon]")
        answered(page)
        expect(notice).to_be_hidden()


def test_answers_of_the_picture_before_are_never_shown(open_page: Opener) -> None:
    """The worst order: A's answers come after B's, and its stream does not end when it is aborted."""
    with open_page() as page:
        expect(page.locator("tr[data-model=cifar100-mha]")).to_be_visible()
        page.evaluate(
            """() => {
              const { fetch } = window;
              window.fetch = (path, init) => {
                if (!String(path).startsWith('v1/compare')) return fetch(path, init);
                window.fetch = fetch;
                const body = new ReadableStream({ start: stream => { window.streamOfA = stream; } });
                return Promise.resolve(new Response(body, { status: 200 }));
              };
            }"""
        )
        page.click("[data-sample=raccoon]")
        until(page, "window.streamOfA")
        page.click("[data-sample=rocket]")
        before = answered(page)
        assert set(before.values()) == {"rocket"}
        mean = seen_pixels(page)["mean"]
        page.evaluate(
            """async () => {
              const send = event => window.streamOfA.enqueue(new TextEncoder().encode(JSON.stringify(event) + '\\n'));
              send({ event: 'picture', models: ['cifar100-mha'], width: 1, height: 1, png: '' });
              send({ event: 'answer', model: 'cifar100-mha', version: 4,
                     predictions: [{ index: 0, label: 'apple', probability: 1 }],
                     timings_ms: { read: 1, decode: 1, queue: 1, inference: 1, total: 4 } });
              send({ event: 'end', request_id: 'a', agreement: { model: 'cifar100-mha', of: 0, agree: 0 } });
              window.streamOfA.close();
              for (let turn = 0; turn < 20; turn += 1) await new Promise(requestAnimationFrame);
            }"""
        )
        assert answered(page) == before
        assert verdict(page) == "rocket"
        assert seen_pixels(page)["mean"] == mean
        expect(page.locator("#notice")).to_be_hidden()


def test_a_new_picture_ends_the_request_of_the_one_before(open_page: Opener) -> None:
    with open_page() as page:
        # The first request is held, so that it cannot be answered before the second picture comes.
        page.route("**/v1/compare*", lambda _: None, times=1)
        choose(page, name="first.jpg", content=(SAMPLES / "raccoon.jpg").read_bytes())
        expect(page.locator("#seen")).to_contain_text("sending")
        with page.expect_event("requestfailed", lambda request: "v1/compare" in request.url):
            page.click("[data-sample=rocket]")
        assert set(answered(page).values()) == {"rocket"}


def test_a_service_that_is_gone_is_said_once(browser: "Browser") -> None:
    with (
        serving(ROOT / "models", environment={"STRIDEVIT_MODELS": "cifar100-mha"}) as (url, process),
        opened(browser, f"{url}/#compare?sample=rocket") as page,
    ):
        answered(page)
        process.kill()
        process.wait()
        notice = page.locator("#notice")
        page.click("[data-sample=grace_hopper]")
        expect(notice).to_contain_text("The service does not answer.")
        choose(page, name="other.jpg", content=(SAMPLES / "raccoon.jpg").read_bytes())
        expect(page.locator("#seen")).to_have_text("no picture")
        expect(notice).to_contain_text("The service does not answer.")
        expect(notice.locator("p")).to_have_count(1)
        expect(page.get_by_role("button", name="Try again")).to_be_visible()
        expect(page.locator(".top")).to_have_count(0)


@pytest.mark.parametrize("is_sample", [True, False])
def test_what_is_copied_runs_as_it_is(is_sample: bool, service: str, open_page: Opener, tmp_path: Path) -> None:
    name = "it's mine.jpg"
    shutil.copy(SAMPLES / "rocket.jpg", tmp_path / name)
    with open_page("#compare?sample=rocket") as page:
        answered(page)
        if not is_sample:
            choose(page, name=name, content=(SAMPLES / "rocket.jpg").read_bytes())
            answered(page)
        page.click("text=Copy as curl")
        command = page.locator(".snippet").inner_text()
        page.click("text=Copy as Python")
        script = page.locator(".snippet").inner_text()
        page.click("[data-sample=raccoon]")
        expect(page.locator(".snippet")).to_be_hidden()
    for run in (["sh", "-c", command], [sys.executable, "-c", script]):
        environment = {**os.environ, "no_proxy": "*", "NO_PROXY": "*"}
        done = subprocess.run(run, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        assert done.stdout.count('"event":"answer"') == len(ready_models(service)), done


def verdict_when_answered(page: object) -> str:
    answered(page)  # type: ignore[arg-type]
    return verdict(page)  # type: ignore[arg-type]
