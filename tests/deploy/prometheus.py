"""A real Prometheus that scrapes a service, and the selectors of expressions."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.experiment.server import free_port
from tests.processes import PATIENCE_SECONDS, get

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs prometheus and promtool: apt-get install --no-install-recommends prometheus",
)

_SELECTOR = re.compile(r"\b(?:stridevit|process)[_:][a-z0-9_:]+(?:\{[^}]*\})?|\bup(?=\{)\{[^}]*\}")


def selectors(expression: str) -> list[str]:
    """Every metric selector of an expression, with its matchers."""
    return _SELECTOR.findall(expression)


def metric_names(expression: str) -> set[str]:
    """The metrics that an expression names, without recorded ones."""
    names = {selector.partition("{")[0] for selector in selectors(expression)}
    return {name for name in names if ":" not in name}


class Prometheus:
    """The HTTP API of a Prometheus."""

    def __init__(self, url: str) -> None:
        self._url = url

    def _ask(self, path: str, **parameters: Any) -> Any:
        answer = get(f"{self._url}/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", json.dumps(answer)
        return answer["data"]

    def matches(self, selector: str) -> bool:
        """Whether there is a series."""
        return bool(self._ask("series", **{"match[]": selector}))

    def values(self, expression: str) -> list[float]:
        """The values of an instant query."""
        return [float(one["value"][1]) for one in self._ask("query", query=expression)["result"]]

    def rule_errors(self) -> dict[str, str]:
        """What each rule's last evaluation ended with, if it was no success."""
        rules = [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]
        return {rule["name"]: rule["lastError"] for rule in rules if rule.get("lastError")}


@contextmanager
def scraping(target: str, rules: Path, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus with `rules` that scrapes `target` every two seconds as job `stridevit`, until the block ends."""
    configuration = {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "2s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "stridevit", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(configuration), encoding="utf-8")  # JSON is YAML
    port = free_port()
    command = [
        *("prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "GOMAXPROCS": "1"})
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with suppress(httpx.TransportError):
                if get(f"http://127.0.0.1:{port}/-/ready").status_code == 200:
                    break
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            assert time.monotonic() < deadline, "Prometheus was not ready"
            time.sleep(0.1)
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
