"""MLPerf LoadGen drives a service over HTTP, one scenario after the other, each with a fresh server and LoadGen.

LoadGen runs in a subprocess (loadtests/mlperf/sut.py): it, and nobody else, times the queries and gives the verdict.
"""

import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from loadtests.errors import LoadTestError
from loadtests.experiment.http_get import get_json
from loadtests.experiment.server import Server, ServerError, service_for
from loadtests.generator.payloads import Payload, PayloadError, describe, read_payloads
from loadtests.mlperf.summary import Accuracy, Summary, accuracy_of, parse_summary

Scenario = Literal["SingleStream", "Offline", "Server"]
SCENARIOS: tuple[Scenario, ...] = ("SingleStream", "Offline", "Server")
"""In the order in which they are run: the rate of the Server scenario is a share of what Offline has reached."""

IMAGES = 1024
"""As many as MLPerf wants in memory for image classification (`performance_sample_count`)."""
SHORT_LATENCY_MS = 100.0
_SHORT_QUERIES: dict[Scenario, int] = {"SingleStream": 100, "Offline": 100, "Server": 1024}
"""For the 99th percentile LoadGen's early stopping needs 459 queries without one that is too late, 1,001 with three."""
_SHORT_WARMUP_SECONDS = 3.0
_FULL_WARMUP_SECONDS = 15.0
_FULL_SECONDS = 600.0
"""MLPerf's least duration of a scenario; LoadGen itself knows it, this is for the estimate."""
_OFFLINE_LONGER = 1.5
"""LoadGen's one query is made larger than the rate demands."""
_START_STOP_SECONDS = 8.0
_LOOK_SECONDS = 0.1
_DEATH_SECONDS = 1.0
_LAST_WORDS = 2000


class MlperfError(LoadTestError):
    """LoadGen did not run to its end; the message holds what the service, or LoadGen, said."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run."""

    model: str
    """Or a family."""
    repository: Path | None
    """Of the service that is started for each scenario; None if one runs at `url`."""
    url: str | None
    data: Path | None
    scenarios: tuple[Scenario, ...]
    accuracy: bool
    """LoadGen's AccuracyOnly mode, which asks about each image once; instead of PerformanceOnly."""
    full: bool
    """MLPerf's own least durations and counts of queries."""
    seconds: float
    """Least duration of a scenario where it is not a full one."""
    target_qps: float | None
    """Of the Server scenario; None for `share`."""
    share: float
    """Of the Offline scenario's samples per second, or if that was not run, of the warm-up's."""
    latency_ms: float | None
    """Which 99 % of the Server scenario's queries must keep; None for MLPerf's own."""
    connections: int
    """Of Offline and Server; SingleStream has one."""
    service_arguments: tuple[str, ...]

    @property
    def mode(self) -> str:
        """LoadGen's name of it."""
        return "AccuracyOnly" if self.accuracy else "PerformanceOnly"

    @property
    def warmup_seconds(self) -> float:
        """Before LoadGen starts; also measures the rate that LoadGen asks to be told."""
        return _FULL_WARMUP_SECONDS if self.full else _SHORT_WARMUP_SECONDS

    def expected_seconds(self, scenario: Scenario) -> float:
        """About how long a scenario takes, with its server's start."""
        least = 0.0 if self.accuracy else _FULL_SECONDS if self.full else self.seconds
        return _START_STOP_SECONDS + self.warmup_seconds + least * (_OFFLINE_LONGER if scenario == "Offline" else 1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One scenario."""

    scenario: Scenario
    summary: Summary
    answered: int
    """With 200."""
    failures: dict[str, int]
    """Requests that were not, by what the server or the connection said. LoadGen takes them for answered."""
    seconds: float
    """That LoadGen took."""
    warmup_rate: float
    """Images a second before LoadGen started."""
    connections: int
    generator_cores: float
    """CPU time of the subprocess, LoadGen's among it, by wall time."""
    loadgen: str
    """Its version."""
    rules: dict[str, float]
    """What MLPerf asks for at least, as LoadGen knows it for image classification."""
    images: int
    model: dict[str, Any] = field(repr=False)
    """What the service says of the model."""
    accuracy: Accuracy | None = None

    @property
    def failed(self) -> int:
        """Requests not answered with 200."""
        return sum(self.failures.values())


@dataclass(kw_only=True)
class Results:
    """What has been measured so far: it fills as `drive` goes on, and is worth a report when that is interrupted."""

    plan: Plan
    command: str
    environment: dict[str, str]
    payloads: str = ""
    runs: list[Run] = field(default_factory=list)
    ended_early: str | None = None
    finished: datetime | None = None

    @property
    def failed(self) -> int:
        """Requests not answered with 200, over all scenarios."""
        return sum(run.failed for run in self.runs)


def drive(plan: Plan, out: Path, results: Results, *, on_step: Callable[[Scenario, float], None]) -> None:
    """Run all scenarios into `results`; LoadGen's logs and the server's are kept in `out/<scenario>/`.

    `on_step(scenario, seconds)` is told all along how long a scenario has run. Raises PayloadError, ServerError if a
    server does not start or dies, and MlperfError if LoadGen does not come to its end.
    """
    payloads = read_payloads(plan.data, limit=None if plan.accuracy else IMAGES)
    if plan.accuracy and not any(payload.label is not None for payload in payloads):
        raise PayloadError("--accuracy needs labelled images: --data must name a set with labels")
    results.payloads = describe(payloads, plan.data)
    with tempfile.TemporaryDirectory(prefix="stridevit-mlperf-") as folder:
        images = Path(folder)
        for position, payload in enumerate(payloads):
            (images / f"{position:06d}").write_bytes(payload.data)
        for scenario in plan.scenarios:
            began = time.monotonic()

            def tell(scenario: Scenario = scenario, began: float = began) -> None:
                on_step(scenario, time.monotonic() - began)

            tell()
            target_qps = plan.target_qps or _share_of_offline(plan, results.runs)
            results.runs.append(_run(plan, scenario, images, payloads, out, target_qps=target_qps, tell=tell))
    results.finished = datetime.now(UTC)


def _share_of_offline(plan: Plan, runs: Sequence[Run]) -> float | None:
    rates = [run.summary.number("Samples per second") for run in runs if run.scenario == "Offline" and not run.failed]
    return plan.share * rates[0] if rates and rates[0] else None


def _run(
    plan: Plan,
    scenario: Scenario,
    images: Path,
    payloads: Sequence[Payload],
    out: Path,
    *,
    target_qps: float | None,
    tell: Callable[[], None],
) -> Run:
    folder = out / scenario
    folder.mkdir(parents=True, exist_ok=True)
    # What an earlier run has left must not be taken for this one's.
    for old in (*folder.glob("mlperf_log_*"), *folder.glob("sut.*"), *folder.glob("server.log")):
        old.unlink()
    with _service(plan, folder / "server.log") as (url, server):
        model = _model(url, plan.model)
        asked = _arguments(plan, scenario, url, images, folder, target_qps=target_qps)
        code = _subprocess(asked, folder / "sut.log", server, tell)
        words = (folder / "sut.log").read_text(encoding="utf-8", errors="replace").strip()[-_LAST_WORDS:]
        said = {} if code else json.loads((folder / "sut.json").read_text(encoding="utf-8"))
        if server and (code or said["failures"]) and _dies(server):
            raise _died(server)
    if code:
        raise MlperfError(f"{scenario}: {words or f'LoadGen ended with {code}'}")
    summary = parse_summary((folder / "mlperf_log_summary.txt").read_text(encoding="utf-8"))
    if summary.verdict is None and not plan.accuracy:
        raise MlperfError(f"{scenario}: LoadGen gave no verdict; see {folder / 'mlperf_log_summary.txt'}")
    accuracy = None
    if plan.accuracy:
        labels = [payload.label for payload in payloads]
        accuracy = accuracy_of(folder / "mlperf_log_accuracy.json", labels, model.get("labels", ()))
    return Run(
        scenario=scenario,
        summary=summary,
        model={name: model[name] for name in ("version", "manifest") if name in model},
        accuracy=accuracy,
        **said,
    )


@contextmanager
def _service(plan: Plan, log: Path) -> Iterator[tuple[str, Server | None]]:
    if plan.url is not None:
        yield plan.url.rstrip("/"), None
        return
    if plan.repository is None:
        raise MlperfError("name a repository to serve, or the URL of a service that runs")
    with service_for(plan.model, repository=plan.repository, log=log, arguments=plan.service_arguments) as server:
        yield server.url, server


def _arguments(
    plan: Plan, scenario: Scenario, url: str, images: Path, folder: Path, *, target_qps: float | None
) -> list[str]:
    connections = 1 if scenario == "SingleStream" else plan.connections
    asked = [url, f"/v1/classify?model={quote(plan.model)}", "--scenario", scenario, "--mode", plan.mode]
    asked += ["--images", str(images), "--out", str(folder), "--connections", str(connections)]
    asked += ["--warmup", f"{plan.warmup_seconds:g}", "--share", f"{plan.share:g}"]
    if not plan.full:
        asked += ["--min-seconds", f"{plan.seconds:g}", "--min-queries", str(_SHORT_QUERIES[scenario])]
    if target_qps is not None:
        asked += ["--target-qps", f"{target_qps:.6g}"]
    if plan.latency_ms is not None:
        asked += ["--latency-ms", f"{plan.latency_ms:g}"]
    return asked


def _subprocess(asked: Sequence[str], log: Path, server: Server | None, tell: Callable[[], None]) -> int:
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603 (our own command)
            [sys.executable, "-m", "loadtests.mlperf.sut", *asked], stdout=stream, stderr=stream
        )
    try:
        while process.poll() is None:
            tell()
            if server and not server.alive():
                raise _died(server)
            time.sleep(_LOOK_SECONDS)
    finally:
        # It has no children, and nothing that it must still write.
        process.kill()
        process.wait()
    return process.returncode


def _dies(server: Server) -> bool:
    """Whether it is gone: connections break somewhat before their process has ended."""
    deadline = time.monotonic() + _DEATH_SECONDS
    while server.alive() and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    return not server.alive()


def _died(server: Server) -> ServerError:
    return ServerError(f"{server.name} died under load; its log, {server.log}, ends:\n{server.log_tail()}")


def _model(url: str, name: str) -> dict[str, Any]:
    """What the service says of the model; nothing if it knows none of this name: it may be a family's."""
    try:
        said: dict[str, Any] = get_json(f"{url}/v1/models/{quote(name)}", timeout=10)
        return said
    except urllib.error.HTTPError:
        return {}
    except (OSError, ValueError) as error:
        raise MlperfError(f"no service answers at {url}: {error}") from error
