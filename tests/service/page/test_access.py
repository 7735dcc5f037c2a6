"""Keys, limits and proxies: what stands between the page and the service."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.processes import PATIENCE_SECONDS, ROOT, serving
from tests.service.page.conftest import WAIT_MS, Opener, opened, until

pytest.importorskip("playwright", reason="needs Playwright (pip install playwright)")

from playwright.sync_api import expect

from tests.service.page.compare_page import answered, verdict

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.slow, pytest.mark.browser]

KEY, RARE_KEY = "a-key-of-32-characters-for-a-test", "a-key-that-may-ask-once-an-hour-x"
READING_KEY = "a-key-that-may-only-read-not-classify"


@pytest.fixture(scope="module")
def guarded(browser: "Browser", tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service with two keys, one of which may classify once in a long while."""
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text(
        "".join(
            f'[[keys]]\nname = "{name}"\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
            f"scopes = {scopes}\n{limit}\n"
            for name, key, scopes, limit in (
                ("usual", KEY, ["classify", "read"], ""),
                ("rare", RARE_KEY, ["classify", "read"], "requests_per_second = 0.001\nburst = 6"),
                ("reading", READING_KEY, ["read"], ""),
            )
        )
    )
    environment = {"STRIDEVIT_KEYS_FILE": str(keys), "STRIDEVIT_MODELS": "cifar100-mha,cifar100-csra-r2"}
    with serving(ROOT / "models", environment=environment) as (url, _):
        yield url


def test_a_key_is_asked_for_and_a_wrong_one_again(browser: "Browser", guarded: str) -> None:
    with opened(browser, f"{guarded}/#compare?sample=rocket") as page:
        form = page.locator("#key-form")
        expect(form).to_contain_text("This service needs an API key.")
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(form).to_contain_text("This key was not accepted")
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        answered(page)
        assert verdict(page) == "rocket"
        expect(form).to_be_hidden()
        assert page.evaluate("Object.values(sessionStorage)") == [KEY]
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.click("text=Copy as curl")
        assert KEY not in page.content()
        page.reload()
        answered(page)


def test_a_key_that_no_header_can_carry_is_asked_for_again(browser: "Browser", guarded: str) -> None:
    with opened(browser, f"{guarded}/#compare?sample=rocket") as page:
        page.fill("#key", f"{KEY}\u200b")
        page.press("#key", "Enter")
        expect(page.locator("#key-form")).to_contain_text("a character that no API key has")
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        answered(page)


def test_a_key_that_may_not_can_be_replaced(browser: "Browser", guarded: str) -> None:
    with opened(browser, f"{guarded}/#compare?sample=rocket") as page:
        page.fill("#key", READING_KEY)
        page.press("#key", "Enter")
        expect(page.locator("#notice")).to_contain_text("Not allowed.")
        page.get_by_role("button", name="Use another key").click()
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        answered(page)
        expect(page.locator("#notice")).to_be_hidden()


def test_a_limit_says_how_long_to_wait(browser: "Browser", guarded: str) -> None:
    with opened(browser, f"{guarded}/#compare") as page:
        page.clock.install()
        page.fill("#key", RARE_KEY)
        page.press("#key", "Enter")
        expect(page.locator("tr[data-model=cifar100-mha]")).to_be_visible()
        notice = page.locator("#notice")
        while notice.is_hidden():
            page.click("[data-sample=rocket]")
            until(page, "!document.querySelector('#notice').hidden || document.querySelector('#timing').textContent")
        expect(notice).to_contain_text("The service is busy.")
        button = notice.get_by_role("button", name=re.compile("Try again"))
        expect(button).to_have_text(re.compile(r"Try again in \d+ s"))
        expect(button).to_be_disabled()
        page.clock.fast_forward("02:00:00")
        expect(button).to_be_enabled()
        expect(button).to_have_text("Try again")


class Prefixed(BaseHTTPRequestHandler):
    """A proxy that offers a service under /lab/vit/."""

    service = ""

    def do_GET(self) -> None:
        self._pass_on("GET", b"")

    def do_POST(self) -> None:
        self._pass_on("POST", self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def _pass_on(self, method: str, body: bytes) -> None:
        prefix = "/lab/vit"
        if not self.path.startswith(prefix + "/"):
            self.send_error(404)
            return
        answer = httpx.request(
            method,
            self.service + self.path.removeprefix(prefix),
            content=body,
            trust_env=False,
            timeout=PATIENCE_SECONDS,
        )
        self.send_response(answer.status_code)
        for name in ("content-type", "content-security-policy", "x-content-type-options"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)


def test_it_works_behind_a_prefix_of_a_proxy(browser: "Browser", service: str) -> None:
    handler = type("Handler", (Prefixed,), {"service": service})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        Thread(target=proxy.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{proxy.server_address[1]}/lab/vit/"
        with opened(browser, f"{url}#compare?sample=rocket") as page:
            answered(page)
            assert verdict(page) == "rocket"
            for tab in ("tokens", "choose", "live"):
                page.click(f"a[href^='#{tab}']")
                expect(page.locator(f"#{tab}")).to_be_visible()
            expect(page.locator("#tiles .tile")).not_to_have_count(0)
            expect(page.locator("#chart-rate canvas")).to_be_visible()
        proxy.shutdown()


def test_a_policy_that_is_broken_would_be_noticed(open_page: Opener) -> None:
    """The other tests fail on a violation; this one shows that they would."""
    with pytest.raises(AssertionError, match="Content Security Policy"), open_page() as page:
        page.evaluate(
            """async () => {
              const image = new Image();
              image.src = 'http://elsewhere.invalid/x.png';
              await new Promise(resolve => { image.onerror = resolve; });
            }"""
        )


def test_a_camera_that_cannot_be_opened_is_said(open_page: Opener) -> None:
    with open_page() as page:
        page.click("#camera")
        expect(page.locator("#notice")).to_contain_text("there is no camera, or it was not allowed", ignore_case=True)


def test_the_camera_gives_a_picture(browser: "Browser", service: str) -> None:
    """Chromium's own moving test picture in place of a camera."""
    fake = browser.browser_type.launch(
        executable_path=shutil.which("chromium"),
        args=["--headless", "--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
        timeout=WAIT_MS,
    )
    try:
        with opened(fake, f"{service}/", permissions=["camera"]) as page:
            page.click("#camera")
            until(page, "document.querySelector('dialog video')?.videoWidth > 0")
            page.click("text=Take the picture")
            assert len(answered(page)) > 1
            expect(page.locator("dialog")).to_have_count(0)
    finally:
        fake.close()
