"""Time from choosing a sample picture to the first answer's row and to the last one's, in Chromium on this machine.

python -m tests.service.page.measure
"""

import os
import shutil
import sys
from statistics import median

from playwright.sync_api import sync_playwright

from tests.processes import ROOT, serving
from tests.service.page.compare_page import answered
from tests.service.page.conftest import FLAGS, WAIT_MS, opened

_ROUNDS = 20


def main() -> int:
    """Print medians and ranges of fresh pages, each with one picture; the first page warms the browser up."""
    first, last = [], []
    with serving(ROOT / "models") as (url, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for _ in range(_ROUNDS + 1):
            with opened(browser, f"{url}/#compare") as page:
                page.set_default_timeout(WAIT_MS)
                page.wait_for_selector("tr[data-model]")
                page.click("[data-sample=raccoon]")
                models = len(answered(page))
                first.append(float(page.get_attribute("#timing", "data-first-ms") or "nan"))
                last.append(float(page.get_attribute("#timing", "data-last-ms") or "nan"))
        browser.close()
    print(f"{_ROUNDS} pages, {models} models, {os.cpu_count()} cores; load average {os.getloadavg()[0]:.1f}")
    for name, times in (("first", first[1:]), ("last", last[1:])):
        print(f"{name} answer: median {median(times):.0f} ms, {min(times):.0f} to {max(times):.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
