"""Loads applied by a generator in its own process, with the CPU time of generator and server, and server memory.

Locust sends them, except those of several steps, whose rates exceed what it can send from one core (open_loop.py).
"""

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import psutil

from loadtests.experiment.model import Load, Plan
from loadtests.experiment.process import start
from loadtests.experiment.server import Server, ServerError, mean_stages_ms
from loadtests.generator.load_result import ANSWER_SECONDS, LoadResult, window
from loadtests.generator.samples import Samples, read_samples
from service.host import gpu_process_bytes, process_tree, process_tree_bytes

LOCUSTFILE = Path(__file__).parents[1] / "generator" / "locustfile.py"

BEYOND_SECONDS = 1.0
"""A generator sends for this much longer than the window, so that its last requests are sent like all others."""
_JITTER_SECONDS = 1.0
_READ_SECONDS = 0.05
_PSS_SECONDS = 1.0
_PSS_GROWTH = 1.005
_SPARE_SECONDS = 90
_FIRST_ARRIVAL = 5
"""In mean gaps; the window begins with the first arrival, which comes later than this in one of 150 runs."""


class Meter:
    """CPU time and memory over time, at a negligible cost.

    For PSS, the kernel walks over all pages, which takes some ten milliseconds. So it is read once per second, and when
    resident memory, which costs nothing to read, has grown. For a server at a URL, only the generator is known.
    """

    def __init__(self, server: Server, generator: int) -> None:
        self._server = server.pid
        pids = [pid for pid in (generator, server.pid) if pid is not None]
        self._processes = [psutil.Process(pid) for pid in pids]
        self._parts = server.parts
        self._times: list[tuple[float, ...]] = []
        self._resident, self._read_at = 0, 0.0
        self.peak_bytes = 0
        self.device_bytes: int | None = None

    def read(self) -> None:
        """Take one sample, unless a process has ended."""
        now = time.time()
        try:
            spent = [_cpu_seconds(process) for process in self._processes]
            spent += [seconds() for seconds in self._parts.values()]
            resident = self._processes[-1].memory_info().rss
        except (psutil.Error, OSError):
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
        """CPU time ÷ wall time of server and generator, in a window that begins at a Unix time; 0 if unknown."""
        used = self._cores(begin, seconds)[: len(self._processes)]
        generator, server = (*used, 0.0, 0.0)[:2]
        return server, generator

    def part_cores(self, begin: float, seconds: float) -> dict[str, float]:
        """The same for the server's parts."""
        return dict(zip(self._parts, self._cores(begin, seconds)[len(self._processes) :], strict=False))

    def _cores(self, begin: float, seconds: float) -> list[float]:
        if not self._times:
            return []
        moments, *spent = np.array(self._times).T
        return [float(np.diff(np.interp([begin, begin + seconds], moments, one))[0] / seconds) for one in spent]


def _cpu_seconds(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


def requests_of(payloads: Path, plan: Plan, model: str) -> list[str]:
    """What is sent, as arguments of the locustfile; `payload_cache.save` has filled the folder `payloads`."""
    deadline_ms = f"{plan.deadline_ms or 0:g}"
    return ["--data", str(payloads), "--model", model, "--protocol", plan.protocol, "--deadline-ms", deadline_ms]


def apply_load(
    server: Server,
    requests: Sequence[str],
    load: Load,
    *,
    warmup_seconds: float,
    seconds: float,
    seed: int,
    cores: Collection[int] = (),
) -> LoadResult:
    """Put a server under a load of `requests_of`, and measure it for `seconds` (or all its steps). Raises ServerError.

    In a closed loop, a connection sends its next image when its last answer has come. In an open one, arrivals are a
    Poisson process, and latency counts from the scheduled moments.
    """
    arguments = [*requests, "--seed", str(seed), "--in-flight", str(load.in_flight)]
    run = run_locust
    if not load.reuse_connections:
        arguments.append("--new-connections")
    if load.steps:
        warmup_seconds, seconds = 0.0, sum(length for _, length in load.steps)
        rates = ",".join(f"{rate:g}:{length:g}" for rate, length in load.steps)
        arguments += ["--rates", rates]
        run = run_open_loop
    elif load.connections is not None:
        # A slow server answers in bursts, in a rhythm that begins with the load. If every window began at the same
        # point of it, what the window cuts off would look like a difference between arms.
        warmup_seconds += _JITTER_SECONDS * float(np.random.default_rng(seed).random())
        arguments += ["--loop", "closed", "--users", str(load.connections), "--spawn-rate", str(load.connections)]
    elif load.rate is not None:
        arguments += ["--loop", "open", "--users", "1", "--rate-per-user", f"{load.rate:.6f}"]
    whole = warmup_seconds + seconds + BEYOND_SECONDS + (_FIRST_ARRIVAL / load.rate if load.rate else 0)
    if not load.steps:
        arguments += ["--seconds", str(math.ceil(whole))]
    before, counted = server.stage_totals(), server.counts()
    samples, meter = run(server, arguments, seconds=whole, cores=cores)
    # The warm-up begins with the first request.
    begin = samples.due_s.min() + warmup_seconds
    server_cores, generator_cores = meter.cores(begin, seconds)
    return window(
        samples,
        begin=begin,
        seconds=seconds,
        connections=load.connections,
        traced=load.traced or bool(load.steps),
        offered_rate=load.rate,
        peak_bytes=meter.peak_bytes,
        server_cores=server_cores,
        generator_cores=generator_cores,
        part_cores=meter.part_cores(begin, seconds),
        counts={name: value - counted.get(name, 0.0) for name, value in server.counts().items()},
        device_bytes=meter.device_bytes,
        stages_ms=mean_stages_ms(before, server.stage_totals()),
    )


def run_locust(
    server: Server, arguments: Sequence[str], *, seconds: float, cores: Collection[int] = ()
) -> tuple[Samples, Meter]:
    """Run Locust on some cores until it ends. Raises ServerError if it or the server fails, or nothing was sent."""
    command = ["locust", "-f", str(LOCUSTFILE), "--headless", "--loglevel", "WARNING", "--only-summary"]
    command += ["--stop-timeout", f"{ANSWER_SECONDS:g}"]
    return _run(server, [*command, *arguments], seconds, cores)


def run_open_loop(
    server: Server, arguments: Sequence[str], *, seconds: float, cores: Collection[int] = ()
) -> tuple[Samples, Meter]:
    """Run `generator.open_loop` as `run_locust` runs Locust."""
    return _run(server, ["loadtests.generator.open_loop", *arguments], seconds, cores)


def _run(server: Server, module: Sequence[str], seconds: float, cores: Collection[int]) -> tuple[Samples, Meter]:
    # Leave out the variables that would change what the generator does.
    foreign = ("STRIDEVIT_LOAD_", "LOCUST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    with tempfile.TemporaryDirectory(prefix="stridevit-samples-") as folder, tempfile.TemporaryFile("w+") as errors:
        path, deadline = Path(folder) / "samples.csv", time.monotonic() + seconds + _SPARE_SECONDS
        command = [sys.executable, "-m", *module, "--host", server.url, "--samples", str(path)]
        with start(command, stdout=subprocess.DEVNULL, stderr=errors, environment=environment, cores=cores) as process:
            meter = Meter(server, process.pid)
            while process.poll() is None and time.monotonic() < deadline and server.alive():
                meter.read()
                time.sleep(_READ_SECONDS)
            hangs = process.poll() is None
        if not server.alive():
            raise server.died("under load")
        if hangs:
            raise ServerError(f"the load generator did not end within {seconds + _SPARE_SECONDS:.0f} s")
        if process.returncode:
            errors.seek(0)
            raise ServerError(f"the load generator failed ({process.returncode}):\n{errors.read()[-2000:]}")
        samples = read_samples(path)
    if not len(samples):
        raise ServerError(f"nothing was sent to {server.name}")
    return samples, meter
