"""The service against the engine limit and a plain server: interleaved, each in a fresh process, one generator.

A round measures three arms, every other round backwards: `engine` (decode and engine without HTTP, the service's own
command), `service`, and `plain` (loadtests/baseline/plain_fastapi.py). The two servers are driven in a closed loop at
each number of connections; then the service alone in an open loop, at a share of what it has just reached.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from loadtests.experiment.locust_runner import RequestSpec, closed_loop, open_loop
from loadtests.experiment.server import Server, ServerError, end, running, running_server
from loadtests.generator import payload_cache
from loadtests.generator.load_result import LoadResult
from loadtests.generator.payloads import describe, read_payloads

Arm = Literal["engine", "service", "plain"]
ARMS: tuple[Arm, ...] = ("engine", "service", "plain")

_PLAIN = "loadtests.baseline.plain_fastapi"
_ENGINE_SPARE_SECONDS = 600
_ENGINE_TRIALS_SECONDS = 20
_START_STOP_SECONDS = 6
_GENERATOR_SECONDS = 4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured and how long."""

    repository: Path
    model: str
    data: Path | None
    rounds: int
    seconds: float
    """Measured, of each load, after the warm-up."""
    warmup_seconds: float
    connections: tuple[int, ...]
    """Ascending; the last stands for saturation."""
    load_fraction: float
    """Of the saturated throughput, offered in the open loop."""
    service_arguments: tuple[str, ...]

    def steps(self) -> Iterator[tuple[int, Arm]]:
        """(round, arm) in the order in which they are measured."""
        for number in range(self.rounds):
            for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
                yield number, arm

    def estimated_seconds(self) -> float:
        """About how long it takes."""
        load = self.seconds + self.warmup_seconds + _GENERATOR_SECONDS
        loads = 2 * len(self.connections) + 1
        return self.rounds * (loads * load + 3 * _START_STOP_SECONDS + self.seconds + _ENGINE_TRIALS_SECONDS)

    def total(self) -> int:
        """Measurements in all."""
        return self.rounds * (2 * len(self.connections) + 2)


@dataclass(frozen=True, kw_only=True)
class Drive:
    """One load on one server; `idle_bytes` is of the fresh process."""

    round: int
    arm: Arm
    idle_bytes: int
    load: LoadResult


@dataclass(kw_only=True)
class Results:
    """What has been measured so far: it fills as `measure` goes on, and is worth a report when that is interrupted."""

    plan: Plan
    command: str
    environment: dict[str, str]
    payloads: str = ""
    limits: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By round: what `python -m service engine-limit` said."""
    drives: list[Drive] = field(default_factory=list)
    ended_early: str | None = None
    finished: datetime | None = None


def measure(plan: Plan, out: Path, results: Results, *, on_step: Callable[[str, int], None]) -> None:
    """Fill `results`; `on_step(what, done)` is told before each measurement. Server logs are kept in `out`.

    Raises PayloadError, or ServerError if a server does not start, dies, or the engine limit cannot be had.
    """
    out.mkdir(parents=True, exist_ok=True)

    def tell(number: int, what: str) -> None:
        on_step(f"round {number + 1}, {what}", len(results.limits) + len(results.drives))

    with tempfile.TemporaryDirectory(prefix="stridevit-load-") as folder:
        files, payloads = Path(folder), read_payloads(plan.data)
        payload_cache.save(payloads, files)
        results.payloads = describe(payloads, plan.data)
        for number, arm in plan.steps():
            if arm == "engine":
                tell(number, "engine limit")
                results.limits[number] = engine_limit(plan, files / payload_cache.IMAGES)
                continue
            with _server(plan, arm, log=out / f"{arm}-{number}.log") as server:
                idle_bytes = server.memory_bytes()
                for load in _loads(plan, arm, server, files, seed=number, tell=partial(tell, number)):
                    results.drives.append(Drive(round=number, arm=arm, idle_bytes=idle_bytes, load=load))
    results.finished = datetime.now(UTC)


def _loads(
    plan: Plan, arm: Arm, server: Server, payloads: Path, *, seed: int, tell: Callable[[str], None]
) -> Iterator[LoadResult]:
    ask = RequestSpec(payloads=payloads, model=plan.model)
    window = {"warmup_seconds": plan.warmup_seconds, "seconds": plan.seconds}
    saturated = 0.0
    for connections in plan.connections:
        tell(f"{arm}, {connections} connection{'s' * (connections > 1)}")
        load = closed_loop(server, ask, connections=connections, **window)
        saturated = load.throughput
        yield load
    if arm != "service":
        return
    if not saturated:
        raise ServerError(f"{server.name} answered no image within {plan.seconds:g} s; its log is {server.log}")
    tell(f"service, {plan.load_fraction:.0%} load")
    yield open_loop(server, ask, rate=plan.load_fraction * saturated, seed=seed, **window)


def _server(plan: Plan, arm: Arm, *, log: Path) -> AbstractContextManager[Server]:
    if arm == "service":
        return running_server(plan.repository, plan.model, log=log, arguments=plan.service_arguments)
    plain = [sys.executable, "-m", _PLAIN, str(newest(plan.repository, plan.model)), "--port"]
    return running(lambda port: [*plain, str(port)], name="the plain server", log=log)


def newest(repository: Path, model: str) -> Path:
    """The folder of a model's newest version. Raises ServerError."""
    folders = [entry for entry in (repository / model).glob("*") if entry.name.isdecimal()]
    if not folders:
        raise ServerError(f"model {model!r}: no version of it in {repository}")
    return max(folders, key=lambda entry: int(entry.name))


def engine_limit(plan: Plan, images: Path) -> dict[str, Any]:
    """Ask the service's own command, in a process of its own. Raises ServerError."""
    command = [sys.executable, "-m", "service", "engine-limit", "--model", plan.model, "--data", str(images)]
    asked = ["--repository", str(plan.repository), "--seconds", f"{plan.seconds:g}", "--json"]
    process = subprocess.Popen(  # noqa: S603 (our own command)
        [*command, *asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = process.communicate(timeout=plan.seconds + _ENGINE_SPARE_SECONDS)
    except subprocess.TimeoutExpired:
        raise ServerError(f"the engine limit was not measured within {_ENGINE_SPARE_SECONDS} s") from None
    finally:
        end(process)
    if process.returncode:
        raise ServerError(f"the engine limit could not be measured:\n{errors[-2000:]}")
    try:
        said: dict[str, Any] = json.loads(output)
    except ValueError as error:
        raise ServerError(f"the engine limit is not JSON: {output[-500:]!r}") from error
    return said
