"""Compare models: interleaved blocks, a fresh service process for each, the same images in the same order."""

import csv
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtests.payloads import write_payloads
from loadtests.server import ServerError, running_server

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_LOCUST_SPARE_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared and how long."""

    repository: Path
    models: tuple[str, ...]
    data: Path | None
    users: int
    """Closed-loop users: each sends its next image when its last is answered."""
    seconds: float
    """Measured seconds a block, after the warm-up."""
    warmup_seconds: float
    rounds: int
    """Blocks a model; their order turns round every time (A B C, C B A, ...)."""

    def order(self) -> list[tuple[int, str]]:
        """(round, model) of each block, in the order in which they run."""
        blocks: list[tuple[int, str]] = []
        for number in range(self.rounds):
            names = self.models if number % 2 == 0 else self.models[::-1]
            blocks += [(number, name) for name in names]
        return blocks


@dataclass(frozen=True, kw_only=True)
class Block:
    """One measurement of one model."""

    model: str
    throughput: float
    """Answered images a second."""
    latencies_ms: npt.NDArray[np.float64] = field(repr=False)
    """Of all answered images, after the warm-up."""
    errors: int
    idle_bytes: int
    peak_bytes: int
    info: dict[str, Any] = field(repr=False)
    """What the service says of the model."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All blocks, and where they were measured."""

    plan: Plan
    payloads: str
    blocks: list[Block]
    environment: dict[str, str]
    finished: datetime

    def of(self, model: str) -> list[Block]:
        """The blocks of one model."""
        return [block for block in self.blocks if block.model == model]


def compare(plan: Plan, out: Path, *, on_block: Callable[[str, int, int], None]) -> Comparison:
    """Run all blocks; `on_block(model, done, total)` is told before each.

    Server logs are kept in `out`. Raises PayloadError, or ServerError if a service does not start or dies.
    """
    out.mkdir(parents=True, exist_ok=True)
    blocks: list[Block] = []
    order = plan.order()
    with tempfile.TemporaryDirectory(prefix="stridevit-load-") as folder:
        payloads = write_payloads(plan.data, Path(folder))
        for done, (number, model) in enumerate(order):
            on_block(model, done, len(order))
            blocks.append(_measure(plan, model, Path(folder), out / f"server-{number}-{model}.log"))
    return Comparison(
        plan=plan,
        payloads=payloads,
        blocks=blocks,
        environment=environment(),
        finished=datetime.now(UTC),
    )


def _measure(plan: Plan, model: str, payloads: Path, log: Path) -> Block:
    with (
        running_server(plan.repository, model, log=log) as server,
        tempfile.TemporaryDirectory(prefix="stridevit-samples-") as folder,
    ):
        info = server.models()[model]
        samples = Path(folder) / "samples.csv"
        server.watch_memory()
        _run_locust(plan, model, server.url, payloads, samples)
        server.stop_watching()
        if not server.alive():
            raise ServerError(f"the service for {model} died under load; its log is {log}")
        starts, latencies, ok = read_samples(samples)
        idle, peak = server.idle_bytes, server.peak_bytes
    begin = float(starts.min(initial=np.inf)) + plan.warmup_seconds
    throughput, measured = within(starts, latencies, ok, begin=begin, seconds=plan.seconds)
    return Block(
        model=model,
        throughput=throughput,
        latencies_ms=latencies[measured & ok],
        errors=int((measured & ~ok).sum()),
        idle_bytes=idle,
        peak_bytes=peak,
        info=info,
    )


def within(
    starts: npt.NDArray[np.float64],
    latencies_ms: npt.NDArray[np.float64],
    ok: npt.NDArray[np.bool_],
    *,
    begin: float,
    seconds: float,
) -> tuple[float, npt.NDArray[np.bool_]]:
    """Throughput of a window, and which samples count for its latencies. `starts` and `begin` are in seconds.

    Throughput counts the answers that *ended* in the window; latencies are of the requests that *started* in it,
    whenever they ended. To ask for both would leave out the slowest, and those of a slow server most.
    """
    ends = starts + latencies_ms / 1000
    answered = ok & (ends > begin) & (ends <= begin + seconds)
    return float(answered.sum() / seconds), (starts >= begin) & (starts < begin + seconds)


def _run_locust(plan: Plan, model: str, url: str, payloads: Path, samples: Path) -> None:
    seconds = plan.warmup_seconds + plan.seconds + 1
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", url]
    load = ["--users", str(plan.users), "--spawn-rate", str(plan.users), "--run-time", f"{seconds:.0f}s"]
    quiet = ["--loglevel", "WARNING", "--only-summary", "--stop-timeout", "5"]
    finished = subprocess.run(  # noqa: S603 (our own command)
        [*command, *load, *quiet],
        env={
            **os.environ,
            "STRIDEVIT_LOAD_IMAGES": str(payloads),
            "STRIDEVIT_LOAD_MODEL": model,
            "STRIDEVIT_LOAD_SAMPLES": str(samples),
        },
        capture_output=True,
        text=True,
        timeout=seconds + _LOCUST_SPARE_SECONDS,
        check=False,
    )
    if finished.returncode or not samples.is_file():
        raise ServerError(f"Locust failed ({finished.returncode}):\n{finished.stderr[-2000:]}")


def read_samples(
    path: Path,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    with path.open(encoding="utf-8") as stream:
        rows = [(float(row["start_s"]), float(row["latency_ms"]), row["ok"] == "1") for row in csv.DictReader(stream)]
    starts = np.array([row[0] for row in rows], dtype=np.float64)
    latencies = np.array([row[1] for row in rows], dtype=np.float64)
    return starts, latencies, np.array([row[2] for row in rows], dtype=np.bool_)


def environment() -> dict[str, str]:
    return {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("locust", "stridevit")},
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The plan with paths as text."""
    values = asdict(plan)
    return {**values, "repository": str(plan.repository), "data": str(plan.data) if plan.data else None}
