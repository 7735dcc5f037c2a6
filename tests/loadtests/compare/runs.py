"""Short comparisons, as a user would start them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.processes import PATIENCE_SECONDS, ROOT

SHORT = ["--rounds", "2", "--seconds", "1", "--warmup", "0", "--connections", "4", "--capacity-searches", "0"]


def arguments(models: str, out: Path, *more: str, aa_run: bool = False) -> list[str]:
    asked = [*SHORT, "--aa-run" if aa_run else "--no-aa-run", *more]
    return ["compare", "--models", models, "--out", str(out), *asked]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "loadtests", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=ROOT, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def read(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "results.json").read_text())
    return document
