"""Models timed side by side: a fresh process for each measurement, rounds interleaved, memory beside speed.

One process runs one model at one batch size for a while (probe.py). A round measures each model once at each batch
size, every other round backwards, so that what slows the machine for a minute slows all alike. A ratio is the mean of
its logarithm over rounds, and its interval a bootstrap over rounds: neighbours of the same minute are compared.
"""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap

from export.bundles import make_graph
from export.graph import OPSET, ExportError, serialise, to_onnx
from export.probe import Probe
from export.sources import random_weights
from service.bundle import read_bundle
from service.manifest import Precision
from training.models import Architecture

Form = Literal["shaped", "unshaped"]
"""As served, or as torch's exporter writes the model by itself."""

MIN_ROUNDS_FOR_INTERVAL = 5
SECONDS_TO_START = 2.0
"""Of a probe's process, about, for the estimate."""

THESIS = {"csra-r2": (3.3, -13.8), "csra-r4": (22.9, -27.2)}
"""C-SRA against MHA at 384 px on a GPU: throughput and peak memory, %. (A Master's thesis, Cal Poly 2026.)"""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the models that are compared; `size` is its image's side in pixels."""

    label: str
    variant: str | None
    model: Path
    size: int
    tokens: int | None
    kv_tokens: int | None


def bundle_arm(folder: Path) -> Arm:
    """A published bundle. Raises BundleError."""
    bundle = read_bundle(folder)
    manifest = bundle.manifest
    attention = manifest.attention
    return Arm(
        label=f"{manifest.name}/{bundle.version}",
        variant=attention.variant if attention else None,
        model=bundle.model_path,
        size=manifest.preprocessing.crop,
        tokens=attention.tokens if attention else None,
        kv_tokens=attention.kv_tokens if attention else None,
    )


def random_arm(
    spec: Architecture, folder: Path, *, label: str, precision: Precision = "fp32", opset: int = OPSET, form: Form
) -> Arm:
    """`spec` with random weights, written into `folder`. Raises ExportError."""
    source = random_weights(spec)
    if form == "unshaped":
        graph = to_onnx(source.classifier, opset=opset, shaped=False)
    else:
        graph = make_graph(source, precision, opset=opset)
    model = folder / f"{label.replace(' ', '-')}.onnx"
    model.write_bytes(serialise(graph))
    return Arm(
        label=label,
        variant=spec.variant,
        model=model,
        size=spec.image_shape[0],
        tokens=spec.grid[0] * spec.grid[1],
        kv_tokens=spec.kv_tokens,
    )


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How to measure. `threads` is for the CPU."""

    batches: tuple[int, ...]
    rounds: int
    seconds: float
    threads: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A ratio to the baseline, and where 95 % of bootstrapped ones lie; None for too few rounds."""

    ratio: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"×{self.ratio:.2f}"
        return f"×{self.ratio:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model at one batch size, over all whole rounds. Memory in bytes."""

    arm: Arm
    batch: int
    images_per_s: float
    """Median over rounds of a round's median."""
    slowest: float
    fastest: float
    ratio: Interval
    latency_ms: float
    """Of a batch, median."""
    added_bytes: int
    """Peak above the session before its first run, median over rounds."""
    peak_bytes: int


@dataclass(kw_only=True)
class Measured:
    """All probes so far, in whole rounds."""

    arms: list[Arm]
    setup: Setup
    probes: dict[tuple[str, int], list[Probe]] = field(default_factory=dict)
    rounds: int = 0

    def cells(self) -> Iterator[Cell]:
        """One for each model and batch size; ratios are to the first model."""
        for batch, arm in product(self.setup.batches, self.arms):
            probes = self.probes[arm.label, batch][: self.rounds]
            rates, baseline = self._rates(arm, batch), self._rates(self.arms[0], batch)
            yield Cell(
                arm=arm,
                batch=batch,
                images_per_s=float(np.median(rates)),
                slowest=float(rates.min()),
                fastest=float(rates.max()),
                ratio=ratio(rates, baseline),
                latency_ms=1000 * batch / float(np.median(rates)),
                added_bytes=int(np.median([probe.peak_bytes - probe.idle_bytes for probe in probes])),
                peak_bytes=int(np.median([probe.peak_bytes for probe in probes])),
            )

    def _rates(self, arm: Arm, batch: int) -> npt.NDArray[np.float64]:
        probes = self.probes[arm.label, batch][: self.rounds]
        return np.array([batch / np.median(probe.seconds) for probe in probes])

    def as_json(self, environment: dict[str, Any]) -> str:
        """The cells, what they were made from, and every round's figures."""
        cells = [
            {**asdict(cell), "arm": cell.arm.label, "rates": self._rates(cell.arm, cell.batch).round(3).tolist()}
            for cell in self.cells()
        ]
        arms = [{**asdict(arm), "model": arm.model.name} for arm in self.arms]
        record = {"environment": environment, "setup": asdict(self.setup), "rounds": self.rounds, "arms": arms}
        return json.dumps({**record, "cells": cells, "thesis_percent": THESIS}, indent=1, ensure_ascii=False) + "\n"


def measure(arms: Sequence[Arm], setup: Setup, step: Callable[[str], None]) -> Measured:
    """Run all rounds; `step(what)` is told before each probe. Ctrl-C ends with the whole rounds so far.

    Raises ExportError if a model cannot be run, and KeyboardInterrupt before the first round is whole.
    """
    measured = Measured(arms=list(arms), setup=setup)
    try:
        with _no_interrupt_lost() as raise_if_interrupted:
            for number in range(setup.rounds):
                plan = list(product(setup.batches, arms))
                for batch, arm in plan if number % 2 == 0 else plan[::-1]:
                    raise_if_interrupted()
                    step(f"{arm.label}, batch {batch}, round {number + 1} of {setup.rounds}")
                    measured.probes.setdefault((arm.label, batch), []).append(_probe(arm, batch, setup))
                measured.rounds += 1
    except KeyboardInterrupt:
        if not measured.rounds:
            raise
    return measured


@contextmanager
def _no_interrupt_lost() -> Iterator[Callable[[], None]]:
    """Gives a function that raises KeyboardInterrupt again if Ctrl-C came before.

    Python drops the one that is raised within a destructor, and hundreds of short processes make that likely enough.
    """
    came = threading.Event()

    def remember(*_: object) -> None:
        came.set()
        raise KeyboardInterrupt

    def raise_if_interrupted() -> None:
        if came.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield raise_if_interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def ratio(rates: npt.NDArray[np.float64], baseline: npt.NDArray[np.float64]) -> Interval:
    """Of two series of rates measured round by round, both (rounds,)."""
    logs = np.log(rates / baseline)
    middle = float(np.exp(logs.mean()))
    if len(logs) < MIN_ROUNDS_FOR_INTERVAL or np.ptp(logs) == 0:
        return Interval(ratio=middle, low=None, high=None)
    drawn = bootstrap((logs,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return Interval(ratio=middle, low=float(np.exp(drawn.low)), high=float(np.exp(drawn.high)))


def estimated_seconds(arms: Sequence[Arm], setup: Setup) -> float:
    """How long `measure` will take, about."""
    return len(arms) * len(setup.batches) * setup.rounds * (setup.seconds + SECONDS_TO_START)


def operators(arms: Sequence[Arm], setup: Setup, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of a run by operator, for each model at the largest batch size; `folder` takes the traces.

    One process a model, not interleaved, and slower for being traced: for shares, not for comparing rates.
    """
    largest = max(setup.batches)
    return {
        arm.label: _probe(arm, largest, setup, trace=folder / f"trace-{number}").operators
        for number, arm in enumerate(arms)
    }


def _probe(arm: Arm, batch: int, setup: Setup, *, trace: Path | None = None) -> Probe:
    options: dict[str, object] = {
        "batch": batch,
        "size": arm.size,
        "seconds": setup.seconds,
        "threads": setup.threads,
        "device": setup.device,
    }
    if trace:
        options["trace"] = trace
    command = [sys.executable, "-m", "export.probe", str(arm.model)]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])  # noqa: S603
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ExportError(f"{arm.label} at batch {batch} cannot be measured: {last[0]}")
    return Probe(**json.loads(done.stdout))
