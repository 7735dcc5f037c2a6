"""A server put under load by a generator in a process of its own, with the CPU of both and the server's memory."""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import psutil

from loadtests.compare import LOCUSTFILE, read_samples, within
from loadtests.server import Server, ServerError, tree_bytes

_READ_SECONDS = 0.05
_PSS_SECONDS = 1.0
_PSS_GROWTH = 1.005
_SPARE_SECONDS = 60
_STOP_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a server did under one load. Rates in images a second."""

    connections: int | None
    """Of a closed loop; None in an open one."""
    offered: float | None
    """Arrivals a second of an open loop."""
    throughput: float
    latencies_ms: npt.NDArray[np.float64] = field(repr=False)
    errors: int
    peak_bytes: int
    server_cores: float
    """CPU time by wall time, in the measured window."""
    generator_cores: float
    arrivals: int = 0
    """Of an open loop, the warm-up's among them, as are those that were sent late, or not at all."""
    late: int = 0
    unsent: int = 0


class Meter:
    """CPU time and memory over time, read so that reading costs nothing to speak of.

    PSS takes the kernel a walk over all pages, some ten milliseconds: it is read once a second, and whenever resident
    memory, which is free to read, has grown past what it was at the last time.
    """

    def __init__(self, server: Server, generator: int) -> None:
        self._server = server.pid
        self._processes = (psutil.Process(server.pid), psutil.Process(generator))
        self._times: list[tuple[float, float, float]] = []
        self._resident, self._read_at = 0, 0.0
        self.peak_bytes = 0

    def read(self) -> None:
        """Take one sample; of a process that has ended, none."""
        now = time.time()
        try:
            server, generator = (sum(process.cpu_times()[:2]) for process in self._processes)
            resident = self._processes[0].memory_info().rss
        except psutil.Error:
            return
        self._times.append((now, server, generator))
        if resident > _PSS_GROWTH * self._resident or now > self._read_at + _PSS_SECONDS:
            self.peak_bytes = max(self.peak_bytes, tree_bytes(self._server))
            self._resident, self._read_at = max(resident, self._resident), now

    def cores(self, begin: float, seconds: float) -> tuple[float, float]:
        """Of server and generator, in a window in Unix time."""
        if not self._times:
            return 0.0, 0.0
        moments, *spent = np.array(self._times).T
        server, generator = (np.diff(np.interp([begin, begin + seconds], moments, used))[0] / seconds for used in spent)
        return float(server), float(generator)


def closed_loop(
    server: Server, model: str, images: Path, *, connections: int, warmup_seconds: float, seconds: float
) -> Load:
    """Locust: `connections` users, each sends its next image when its last is answered. Raises ServerError."""
    whole = warmup_seconds + seconds + 1
    command = ["-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", server.url]
    load = ["--users", str(connections), "--spawn-rate", str(connections), "--run-time", f"{math.ceil(whole)}s"]
    quiet = ["--loglevel", "WARNING", "--only-summary", "--stop-timeout", "5"]
    with tempfile.TemporaryDirectory(prefix="stridevit-samples-") as folder:
        samples = Path(folder) / "samples.csv"
        environment = {
            "STRIDEVIT_LOAD_IMAGES": str(images),
            "STRIDEVIT_LOAD_MODEL": model,
            "STRIDEVIT_LOAD_SAMPLES": str(samples),
        }
        meter, _ = generate([*command, *load, *quiet], server, environment=environment, seconds=whole)
        return _load(
            server,
            meter,
            samples,
            warmup_seconds=warmup_seconds,
            seconds=seconds,
            connections=connections,
            offered=None,
        )


def open_loop(
    server: Server, model: str, images: Path, *, rate: float, warmup_seconds: float, seconds: float, seed: int
) -> Load:
    """Poisson arrivals at `rate` (loadtests/openloop.py); latencies from the scheduled moments. Raises ServerError."""
    whole = warmup_seconds + seconds
    with tempfile.TemporaryDirectory(prefix="stridevit-samples-") as folder:
        samples = Path(folder) / "samples.csv"
        command = ["-m", "loadtests.openloop", server.url, f"/v1/classify?model={quote(model)}"]
        load = ["--rate", f"{rate:.6f}", "--seconds", f"{whole:.3f}", "--seed", str(seed)]
        files = ["--images", str(images), "--samples", str(samples)]
        meter, said = generate([*command, *load, *files], server, seconds=whole)
        counts = json.loads(said)
        return _load(
            server,
            meter,
            samples,
            warmup_seconds=warmup_seconds,
            seconds=seconds,
            connections=None,
            offered=rate,
            arrivals=counts["scheduled"],
            late=counts["late"],
            unsent=counts["unsent"],
        )


def end(process: subprocess.Popen[str]) -> None:
    """Stop a process and those that it started."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.Error:
        family = []
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.terminate()
    for member in psutil.wait_procs(family, timeout=_STOP_SECONDS)[1]:
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.wait()


def generate(
    arguments: list[str], server: Server, *, seconds: float, environment: dict[str, str] | None = None
) -> tuple[Meter, str]:
    """Run a generator, `python ARGUMENTS`, against a server to its end: what was measured, and what it said.

    Raises ServerError if the server dies or the generator fails.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(  # noqa: S603 (our own command)
            [sys.executable, *arguments],
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=errors,
            text=True,
        )
        try:
            meter = Meter(server, process.pid)
            deadline = time.monotonic() + seconds + _SPARE_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                meter.read()
                if not server.alive():
                    raise ServerError(
                        f"{server.name} died under load; its log, {server.log}, ends:\n{server.last_words()}"
                    )
                time.sleep(_READ_SECONDS)
        finally:
            end(process)
        for stream in (output, errors):
            stream.seek(0)
        if process.returncode:
            raise ServerError(f"the load generator failed ({process.returncode}):\n{errors.read()[-2000:]}")
        return meter, output.read()


def _load(
    server: Server,
    meter: Meter,
    samples: Path,
    *,
    warmup_seconds: float,
    seconds: float,
    connections: int | None,
    offered: float | None,
    arrivals: int = 0,
    late: int = 0,
    unsent: int = 0,
) -> Load:
    starts, latencies, ok = read_samples(samples)
    if not len(starts):
        raise ServerError(f"nothing was sent to {server.name}")
    begin = float(starts.min()) + warmup_seconds
    throughput, measured = within(starts, latencies, ok, begin=begin, seconds=seconds)
    server_cores, generator_cores = meter.cores(begin, seconds)
    return Load(
        connections=connections,
        offered=offered,
        throughput=throughput,
        latencies_ms=latencies[measured & ok],
        errors=int((measured & ~ok).sum()),
        peak_bytes=meter.peak_bytes,
        server_cores=server_cores,
        generator_cores=generator_cores,
        arrivals=arrivals,
        late=late,
        unsent=unsent,
    )
