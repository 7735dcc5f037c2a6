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
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

import msgspec

from loadtests.errors import LoadTestError
from loadtests.experiment.model import Measurement, Progress
from loadtests.experiment.process import start
from loadtests.experiment.server import Server, service_for
from loadtests.generator import payload_cache
from loadtests.generator.payloads import describe, read_payloads
from loadtests.generator.readers import Label, PayloadError
from loadtests.mlperf.loadgen_logs import figures, parse_summary, top1, unmet
from loadtests.mlperf.plan import Plan, Scenario, Task

IMAGES = 1024
"""The number that MLPerf keeps in memory for image classification (`performance_sample_count`)."""
_POLL_SECONDS = 0.1
_DEATH_SECONDS = 1.0
_LOG_TAIL = 2000


class MlperfError(LoadTestError):
    """LoadGen did not finish; the message holds what the service or LoadGen said."""


@dataclass(kw_only=True)
class MlperfRun(Measurement):
    """Everything measured so far."""

    plan: Plan
    runs: list[dict[str, Any]] = field(default_factory=list)
    """One per scenario, as in results.json: what `sut.drive` and `loadgen_logs` return, and what the service says."""

    @property
    def measured(self) -> bool:
        """Whether a scenario has finished."""
        return bool(self.runs)

    @property
    def failed(self) -> int:
        """Requests not answered with 200, in all scenarios. LoadGen counts them as answered."""
        return sum(run["failed"] for run in self.runs)


def run_scenarios(results: MlperfRun, out: Path, progress: Progress) -> None:
    """Fill `results`; the logs of LoadGen and of the server are kept in `out/<scenario>/`.

    Raises PayloadError, ServerError if a server does not start or dies, MlperfError if LoadGen does not finish.
    """
    plan = results.plan
    minutes = sum(map(plan.estimated_seconds, plan.scenarios)) / 60
    longer = ", and as long as each image takes" if plan.accuracy else ""
    progress.note(f"{', '.join(plan.scenarios)}: about {minutes:.1f} minutes{longer}")
    payloads = read_payloads(plan.data, limit=None if plan.accuracy else IMAGES)
    labels = [payload.label for payload in payloads]
    if plan.accuracy and not any(label is not None for label in labels):
        raise PayloadError("--accuracy needs labelled images: --data must name a set with labels")
    results.payloads = describe(payloads, plan.data)
    with tempfile.TemporaryDirectory(prefix="stridevit-mlperf-") as folder:
        payload_cache.save(payloads, Path(folder))
        for scenario in plan.scenarios:
            images = Path(folder) / payload_cache.IMAGES
            results.runs.append(_run(results, scenario, images, labels, out / scenario, progress))


def _run(
    results: MlperfRun, scenario: Scenario, images: Path, labels: Sequence[Label], out: Path, progress: Progress
) -> dict[str, Any]:
    plan, log = results.plan, out / "server.log"
    out.mkdir(parents=True, exist_ok=True)
    # Files of an earlier run must not be mistaken for this one's.
    for old in (*out.glob("mlperf_log_*"), *out.glob("sut.*"), *out.glob("server.log")):
        old.unlink()
    progress.step(f"{scenario}, seconds", 0, plan.estimated_seconds(scenario))
    with service_for(
        plan.model, repository=plan.repository, log=log, arguments=plan.service_arguments, url=plan.url
    ) as server:
        model = _describe(server, plan.model)
        url = f"{server.url}/v1/classify?model={quote(plan.model)}"
        qps = plan.target_qps or _fraction_of_offline(results)
        task = Task(plan=plan, scenario=scenario, url=url, images=images, out=out, target_qps=qps)
        client = _drive(task, server, progress)
    summary = parse_summary((out / "mlperf_log_summary.txt").read_text(encoding="utf-8"))
    if summary.verdict is None and not plan.accuracy:
        raise MlperfError(f"{scenario}: LoadGen gave no verdict; see {out / 'mlperf_log_summary.txt'}")
    answers = out / "mlperf_log_accuracy.json" if plan.accuracy else None
    return {
        **client,
        "scenario": scenario,
        "mode": plan.mode,
        "model": {name: model[name] for name in ("version", "manifest") if name in model},
        "failed": sum(client["failures"].values()),
        "summary": summary,
        **figures(scenario, summary),
        **top1(answers, labels, model.get("labels", ())),
        "unmet": unmet(scenario, summary, client["rules"]),
    }


def _fraction_of_offline(results: MlperfRun) -> float | None:
    rates = (run["samples_per_second"] for run in results.runs if run["scenario"] == "Offline" and not run["failed"])
    rate = next(rates, None)
    return results.plan.load * rate if rate else None


def _drive(task: Task, server: Server, progress: Progress) -> dict[str, Any]:
    """Run LoadGen's process to its end, and return what it found."""
    what, expected = f"{task.scenario}, seconds", task.plan.estimated_seconds(task.scenario)
    log, began = task.out / "sut.log", time.monotonic()
    command = [sys.executable, "-m", "loadtests.mlperf.sut", msgspec.json.encode(task, enc_hook=str).decode()]
    with log.open("wb") as stream, start(command, stdout=stream, stderr=stream) as process:
        while (code := process.poll()) is None and server.alive():
            progress.step(what, min(time.monotonic() - began, expected), expected)
            time.sleep(_POLL_SECONDS)
    found: dict[str, Any] = json.loads((task.out / "sut.json").read_bytes()) if code == 0 else {}
    if not found or found["failures"]:
        # Connections break shortly before their process has ended.
        time.sleep(_DEATH_SECONDS)
    if not server.alive():
        raise server.died("under load")
    if not found:
        said = log.read_text(encoding="utf-8", errors="replace").strip()[-_LOG_TAIL:]
        raise MlperfError(f"{task.scenario}: {said or f'LoadGen ended with {code}'}")
    return found


def _describe(server: Server, name: str) -> dict[str, Any]:
    """What the service says about a model; empty if it knows no model of this name, which may be a family's."""
    try:
        return server.model(name)
    except HTTPError:
        return {}
    except (OSError, ValueError) as error:
        raise MlperfError(f"{server.name} does not answer as a StrideViT service does: {error}") from error
