"""A server put under load by Locust in a process of its own, with the CPU of both and the server's memory."""

import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from loadtests.experiment import service_metrics
from loadtests.experiment.server import Server, ServerError, end
from loadtests.generator.load_result import ANSWER_SECONDS, LoadResult, Protocol
from loadtests.generator.samples import Sample, read_samples, window
from service.host import gpu_process_bytes, process_tree, process_tree_bytes

LOCUSTFILE = Path(__file__).parents[1] / "generator" / "locustfile.py"
SHAPES = Path(__file__).parents[1] / "generator" / "shapes.py"

_READ_SECONDS = 0.05
_PSS_SECONDS = 1.0
_PSS_GROWTH = 1.005
_SPARE_SECONDS = 90
_FIRST_ARRIVAL = 5
"""Mean gaps: a first arrival comes later than this in one of 150 runs."""


@dataclass(frozen=True, kw_only=True)
class RequestSpec:
    """What is asked of a server: which payloads, of which model, and how."""

    payloads: Path
    """A folder that `loadtests.generator.payload_cache.save` has filled."""
    model: str
    protocol: Protocol = "v1"
    deadline_ms: float | None = None

    def arguments(self) -> list[str]:
        """For the locustfile."""
        asked = ["--data", str(self.payloads), "--model", self.model, "--protocol", self.protocol]
        return asked if self.deadline_ms is None else [*asked, "--deadline-ms", f"{self.deadline_ms:g}"]


class Meter:
    """CPU time and memory over time, read so that reading costs nothing to speak of.

    PSS takes the kernel a walk over all pages, some ten milliseconds: it is read once a second, and whenever resident
    memory, which is free to read, has grown past what it was at the last time. Of a server that is not ours, only the
    generator is known.
    """

    def __init__(self, server: Server, generator: int) -> None:
        self._server = server.pid
        pids = [pid for pid in (generator, server.pid) if pid is not None]
        self._processes = [psutil.Process(pid) for pid in pids]
        self._times: list[tuple[float, ...]] = []
        self._resident, self._read_at = 0, 0.0
        self.peak_bytes = 0
        self.device_bytes: int | None = None

    def read(self) -> None:
        """Take one sample; of a process that has ended, none."""
        now = time.time()
        try:
            spent = [sum(process.cpu_times()[:2]) for process in self._processes]
            resident = self._processes[-1].memory_info().rss
        except psutil.Error:
            return
        self._times.append((now, *spent))
        if self._server is None:
            return
        if resident > _PSS_GROWTH * self._resident or now > self._read_at + _PSS_SECONDS:
            self.peak_bytes = max(self.peak_bytes, process_tree_bytes(self._server))
            on_device = gpu_process_bytes(process.pid for process in process_tree(self._server))
            if on_device is not None:
                self.device_bytes = max(on_device, self.device_bytes or 0)
            self._resident, self._read_at = max(resident, self._resident), now

    def cores(self, begin: float, seconds: float) -> tuple[float, float]:
        """Of server and generator, in a window in Unix time; 0 where it is not known."""
        if not self._times:
            return 0.0, 0.0
        moments, *spent = np.array(self._times).T
        used = [np.diff(np.interp([begin, begin + seconds], moments, one))[0] / seconds for one in spent]
        generator, server = (*used, 0.0)[:2]
        return float(server), float(generator)


def closed_loop(
    server: Server, ask: RequestSpec, *, connections: int, warmup_seconds: float, seconds: float
) -> LoadResult:
    """`connections` users, each sends its next image when its last is answered. Raises ServerError."""
    users = ["--loop", "closed", "--users", str(connections), "--spawn-rate", str(connections)]
    return _load(
        server, ask, users, warmup_seconds=warmup_seconds, seconds=seconds, connections=connections, offered_rate=None
    )


def open_loop(
    server: Server, ask: RequestSpec, *, rate: float, warmup_seconds: float, seconds: float, seed: int
) -> LoadResult:
    """Poisson arrivals at `rate` a second; latencies from the scheduled moments. Raises ServerError."""
    source = ["--loop", "open", "--users", "1", "--rate-per-user", f"{rate:.6f}", "--seed", str(seed)]
    return _load(
        server, ask, source, warmup_seconds=warmup_seconds, seconds=seconds, connections=None, offered_rate=rate
    )


def shaped_loop(
    server: Server, ask: RequestSpec, *, rates: str, seconds: float, rate_per_user: float, seed: int
) -> tuple[list[Sample], Meter]:
    """An open loop whose rate changes, as loadtests/generator/shapes.py reads it. Raises ServerError."""
    shape = ["--loop", "open", "--rates", rates, "--rate-per-user", f"{rate_per_user:g}", "--seed", str(seed)]
    return run_locust(server, ask, shape, seconds=seconds, files=(LOCUSTFILE, SHAPES))


def _load(
    server: Server,
    ask: RequestSpec,
    arguments: list[str],
    *,
    warmup_seconds: float,
    seconds: float,
    connections: int | None,
    offered_rate: float | None,
) -> LoadResult:
    # The window begins with the first arrival, which an open loop may wait for; and a second more, so that the last of
    # the window are sent as all others are.
    whole = math.ceil(warmup_seconds + seconds + 1 + (_FIRST_ARRIVAL / offered_rate if offered_rate else 0))
    before = service_metrics.totals(server.url)
    samples, meter = run_locust(server, ask, [*arguments, "--seconds", str(whole)], seconds=whole)
    found = window(samples, warmup_seconds=warmup_seconds, seconds=seconds)
    server_cores, generator_cores = meter.cores(found.begin, seconds)
    opened = offered_rate is not None
    return LoadResult(
        mode="open" if opened else "closed",
        connections=connections,
        offered_rate=offered_rate,
        throughput=found.throughput,
        latencies_ms=found.latencies_ms,
        errors=found.errors,
        peak_bytes=meter.peak_bytes,
        server_cores=server_cores,
        generator_cores=generator_cores,
        arrivals=len(found.latencies_ms) if opened else 0,
        late_arrivals=found.late_arrivals if opened else 0,
        unsent_arrivals=found.unsent_arrivals,
        device_bytes=meter.device_bytes,
        stages_ms=service_metrics.between(before, service_metrics.totals(server.url)),
        labelled=found.labelled,
        correct=found.correct,
    )


def run_locust(
    server: Server, ask: RequestSpec, arguments: list[str], *, seconds: float, files: tuple[Path, ...] = (LOCUSTFILE,)
) -> tuple[list[Sample], Meter]:
    """Run Locust against a server to its end. Raises ServerError if the server dies, or nothing was sent."""
    command = ["-m", "locust", "-f", ",".join(map(str, files)), "--headless", "--host", server.url]
    quiet = ["--loglevel", "WARNING", "--only-summary", "--stop-timeout", f"{ANSWER_SECONDS:g}"]
    with tempfile.TemporaryDirectory(prefix="stridevit-samples-") as folder:
        path = Path(folder) / "samples.csv"
        meter = _generate([*command, *ask.arguments(), *arguments, *quiet, "--samples", str(path)], server, seconds)
        samples = read_samples(path) if path.is_file() else []
    if not samples:
        raise ServerError(f"nothing was sent to {server.name}")
    return samples, meter


def _environment() -> dict[str, str]:
    """Ours, without what would give the generator other orders than the plan's."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("STRIDEVIT_LOAD_", "LOCUST_"))}


def _generate(arguments: list[str], server: Server, seconds: float) -> Meter:
    """Run `python ARGUMENTS` to its end. Raises ServerError if the server dies or the generator fails."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(  # noqa: S603 (our own command)
            [sys.executable, *arguments], env=_environment(), stdout=subprocess.DEVNULL, stderr=errors, text=True
        )
        try:
            meter = Meter(server, process.pid)
            deadline = time.monotonic() + seconds + _SPARE_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                meter.read()
                if not server.alive():
                    break
                time.sleep(_READ_SECONDS)
            late = process.poll() is None
        finally:
            end(process)
        if not server.alive():
            raise ServerError(f"{server.name} died under load; its log, {server.log}, ends:\n{server.log_tail()}")
        if late:
            raise ServerError(f"the load generator did not end within {seconds + _SPARE_SECONDS:.0f} s")
        if process.returncode:
            errors.seek(0)
            raise ServerError(f"the load generator failed ({process.returncode}):\n{errors.read()[-2000:]}")
        return meter
