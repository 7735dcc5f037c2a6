"""What the images hold, and what is said of it."""

import subprocess
import sys

from tests.processes import ROOT


def test_the_page_of_licences_is_current() -> None:
    made = subprocess.run(
        [sys.executable, "deploy/licences.py"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert (ROOT / "docs" / "licences.md").read_text(encoding="utf-8") == made, "renew it: make licences"


def test_every_package_of_the_images_states_a_licence() -> None:
    rows = [
        line for line in (ROOT / "docs" / "licences.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "
    ]
    assert len(rows) > 40
    assert [row for row in rows if "not stated" in row or "see its metadata" in row] == []
