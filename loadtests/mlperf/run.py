"""MLPerf LoadGen drives a service over HTTP, one scenario after the other, each with a new server and LoadGen process.

LoadGen runs in a subprocess (loadtests/mlperf/sut.py): it alone times the queries and gives the verdict.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import quote

from loadtests.errors import LoadTestError
from loadtests.experiment.model import Measurement, Progress
from loadtests.experiment.process import end, start
from loadtests.experiment.server import Server, service_for
from loadtests.generator import payload_cache
from loadtests.generator.payloads import describe, read_payloads
from loadtests.generator.readers import Payload, PayloadError
from loadtests.mlperf.loadgen_logs import Summary, count_correct, parse_summary

Scenario = Literal["SingleStream", "Offline", "Server"]
SCENARIOS: tuple[Scenario, ...] = ("SingleStream", "Offline", "Server")
"""In the order in which they run: the Server scenario's rate is a fraction of what Offline has reached."""

IMAGES = 1024
"""The number that MLPerf keeps in memory for image classification (`performance_sample_count`)."""
QUICK_LATENCY_MS = 100.0
_QUICK_QUERIES: dict[Scenario, int] = {"SingleStream": 100, "Offline": 100, "Server": 1024}
"""For the 99th percentile, early stopping needs 459 queries if none is too late, 1,001 if three are."""
_QUICK_WARMUP_SECONDS = 3.0
_FULL_WARMUP_SECONDS = 15.0
_FULL_SECONDS = 600.0
"""MLPerf's minimum duration of a scenario, for the estimate; LoadGen itself knows it."""
_OFFLINE_LONGER = 1.5
"""LoadGen's one query is made larger than the rate demands."""
_START_STOP_SECONDS = 8.0
_POLL_SECONDS = 0.1
_DEATH_SECONDS = 1.0
_LOG_TAIL = 2000


class MlperfError(LoadTestError):
    """LoadGen did not finish; the message holds what the service or LoadGen said."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which scenarios run, and for how long."""

    model: str
    """Name of a model or a family."""
    repository: Path
    url: str | None
    """A service that already runs; without one, a service is started for each scenario."""
    data: Path | None
    scenarios: tuple[Scenario, ...]
    accuracy: bool
    """LoadGen's AccuracyOnly mode, which sends each image once, instead of PerformanceOnly."""
    full: bool
    """MLPerf's own minimum durations and query counts."""
    seconds: float
    """Minimum duration of a scenario that is not full."""
    target_qps: float | None
    """Rate of the Server scenario; None for `load`."""
    load: float
    """The Server scenario's rate as a fraction of Offline's samples per second, else of the warm-up's."""
    latency_ms: float | None
    """Bound of the Server scenario's 99th percentile; None for MLPerf's own."""
    connections: int
    """In Offline and Server; SingleStream has one."""
    service_arguments: tuple[str, ...]

    @property
    def mode(self) -> str:
        """LoadGen's name of the mode."""
        return "AccuracyOnly" if self.accuracy else "PerformanceOnly"

    @property
    def warmup_seconds(self) -> float:
        """Before LoadGen starts; the warm-up also measures the rate that LoadGen wants to know."""
        return _FULL_WARMUP_SECONDS if self.full else _QUICK_WARMUP_SECONDS

    def estimated_seconds(self, scenario: Scenario) -> float:
        """About how long a scenario takes, including its server's start."""
        shortest = 0.0 if self.accuracy else _FULL_SECONDS if self.full else self.seconds
        return _START_STOP_SECONDS + self.warmup_seconds + shortest * (_OFFLINE_LONGER if scenario == "Offline" else 1)


@dataclass(frozen=True, kw_only=True)
class ScenarioRun:
    """One scenario."""

    scenario: Scenario
    mode: str
    summary: Summary
    client: dict[str, Any]
    """What LoadGen's process counted, see `loadtests.mlperf.sut.drive`."""
    model: dict[str, Any] = field(repr=False)
    """What the service says about the model."""
    correct: int = 0
    """Right answers, in AccuracyOnly mode."""
    labelled: int = 0
    """Answers to images with a label, in AccuracyOnly mode."""

    @property
    def top1(self) -> float | None:
        """None if no image with a label was answered."""
        return self.correct / self.labelled if self.labelled else None

    @property
    def answered(self) -> int:
        """Requests answered with 200."""
        return int(self.client["answered"])

    @property
    def failed(self) -> int:
        """All other requests. LoadGen takes them for answered."""
        return sum(self.client["failures"].values())


@dataclass(kw_only=True)
class MlperfRun(Measurement):
    """Everything measured so far."""

    plan: Plan
    runs: list[ScenarioRun] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        """Whether a scenario has finished."""
        return bool(self.runs)

    @property
    def failed(self) -> int:
        """Requests not answered with 200, in all scenarios."""
        return sum(run.failed for run in self.runs)


def run_scenarios(results: MlperfRun, out: Path, progress: Progress) -> None:
    """Fill `results`; the logs of LoadGen and of the server are kept in `out/<scenario>/`.

    Raises PayloadError, ServerError if a server does not start or dies, MlperfError if LoadGen does not finish.
    """
    plan = results.plan
    minutes = sum(map(plan.estimated_seconds, plan.scenarios)) / 60
    longer = ", and as long as each image takes" if plan.accuracy else ""
    progress.note(f"{', '.join(plan.scenarios)}: about {minutes:.1f} minutes{longer}")
    payloads = read_payloads(plan.data, limit=None if plan.accuracy else IMAGES)
    if plan.accuracy and not any(payload.label is not None for payload in payloads):
        raise PayloadError("--accuracy needs labelled images: --data must name a set with labels")
    results.payloads = describe(payloads, plan.data)
    with tempfile.TemporaryDirectory(prefix="stridevit-mlperf-") as folder:
        payload_cache.save(payloads, Path(folder))
        for scenario in plan.scenarios:
            results.runs.append(_run(results, scenario, Path(folder), payloads, out / scenario, progress))


def _run(
    results: MlperfRun, scenario: Scenario, folder: Path, payloads: Sequence[Payload], out: Path, progress: Progress
) -> ScenarioRun:
    plan = results.plan
    progress.step(f"{scenario}, seconds", 0, plan.estimated_seconds(scenario))
    out.mkdir(parents=True, exist_ok=True)
    # What an earlier run has left must not be taken for this one's.
    for old in (*out.glob("mlperf_log_*"), *out.glob("sut.*"), *out.glob("server.log")):
        old.unlink()
    log = out / "server.log"
    with service_for(
        plan.model, repository=plan.repository, log=log, arguments=plan.service_arguments, url=plan.url
    ) as server:
        model = _describe(server, plan.model)
        spec = {
            "url": f"{server.url}/v1/classify?model={quote(plan.model)}",
            "scenario": scenario,
            "mode": plan.mode,
            "images": str(folder / payload_cache.IMAGES),
            "out": str(out),
            "connections": 1 if scenario == "SingleStream" else plan.connections,
            "warmup_seconds": plan.warmup_seconds,
            "load": plan.load,
            "target_qps": plan.target_qps or _fraction_of_offline(results),
            "min_seconds": None if plan.full else plan.seconds,
            "min_queries": None if plan.full else _QUICK_QUERIES[scenario],
            "latency_ms": plan.latency_ms,
        }
        client = _drive(spec, out, server, progress, plan.estimated_seconds(scenario))
    summary = parse_summary((out / "mlperf_log_summary.txt").read_text(encoding="utf-8"))
    if summary.verdict is None and not plan.accuracy:
        raise MlperfError(f"{scenario}: LoadGen gave no verdict; see {out / 'mlperf_log_summary.txt'}")
    correct = labelled = 0
    if plan.accuracy:
        labels = [payload.label for payload in payloads]
        correct, labelled = count_correct(out / "mlperf_log_accuracy.json", labels, model.get("labels", ()))
    known = {name: value for name, value in model.items() if name in ("version", "manifest")}
    return ScenarioRun(
        scenario=scenario,
        mode=plan.mode,
        summary=summary,
        client=client,
        model=known,
        correct=correct,
        labelled=labelled,
    )


def _fraction_of_offline(results: MlperfRun) -> float | None:
    for run in results.runs:
        if run.scenario == "Offline" and not run.failed and (rate := run.summary.number("Samples per second")):
            return results.plan.load * rate
    return None


def _drive(spec: dict[str, Any], out: Path, server: Server, progress: Progress, estimate: float) -> dict[str, Any]:
    """Run LoadGen's process to its end, and return what it found."""
    log, began = out / "sut.log", time.monotonic()
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "loadtests.mlperf.sut", json.dumps(spec)]
        process = start(command, stdout=stream, stderr=stream)
    code = None
    try:
        while (code := process.poll()) is None and server.alive():
            progress.step(f"{spec['scenario']}, seconds", min(time.monotonic() - began, estimate), estimate)
            time.sleep(_POLL_SECONDS)
    finally:
        end(process)
    found: dict[str, Any] = {}
    if code == 0:
        found = json.loads((out / "sut.json").read_text(encoding="utf-8"))
    if not found or found["failures"]:
        # Connections break shortly before their process has ended.
        deadline = time.monotonic() + _DEATH_SECONDS
        while server.pid is not None and server.alive() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if not server.alive():
            raise server.died("under load")
    if not found:
        said = log.read_text(encoding="utf-8", errors="replace").strip()[-_LOG_TAIL:]
        raise MlperfError(f"{spec['scenario']}: {said or f'LoadGen ended with {code}'}")
    return found


def _describe(server: Server, name: str) -> dict[str, Any]:
    """What the service says about a model; nothing if it knows none of this name, which may be a family's."""
    try:
        return server.model(name)
    except HTTPError:
        return {}
    except (OSError, ValueError) as error:
        raise MlperfError(f"{server.name} does not answer as a StrideViT service does: {error}") from error
