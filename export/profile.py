"""Models timed side by side: a fresh process per measurement, interleaved rounds, memory beside speed.

One process runs one model at one batch size for a while (probe.py). A round measures each model once at each batch
size, every other round in reverse order, so that a disturbance of a minute affects all models alike. Ratios compare
measurements of the same round (intervals.py).
"""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from export.graph import ExportError, serialise, to_onnx
from export.intervals import Interval, paired_ratio
from export.probe import Probe, Runtime
from export.publish import make_graph
from export.sources import attention, random_weights
from service.bundle import read_bundle
from service.manifest import Attention, Precision
from training.models import Architecture

Form = Literal["shaped", "unshaped"]
"""As served, or as torch's exporter writes the model by itself."""

SECONDS_TO_START = 2.0  # of a probe's process, approximately

THESIS = {"csra-r2": (3.3, -13.8), "csra-r4": (22.9, -27.2)}
"""C-SRA against MHA at 384 px on a GPU: throughput and peak memory, %. (A Master's thesis, Cal Poly 2026.)"""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the models that are compared; `img_size` is the side of its images in pixels."""

    label: str
    model: Path
    img_size: int
    attention: Attention | None
    runtime: Runtime = "onnxruntime"


def by_runtimes(arms: Sequence[Arm], runtimes: Sequence[Runtime]) -> list[Arm]:
    """Every arm with every runtime; labels name the runtime if there are several."""
    return [
        replace(arm, runtime=runtime, label=arm.label + (f" {runtime}" if len(runtimes) > 1 else ""))
        for arm, runtime in product(arms, runtimes)
    ]


def bundle_arm(folder: Path) -> Arm:
    """A published bundle. Raises BundleError."""
    bundle = read_bundle(folder)
    return Arm(
        label=f"{bundle.manifest.name}/{bundle.version}",
        model=bundle.model_path,
        img_size=bundle.manifest.preprocessing.crop,
        attention=bundle.manifest.attention,
    )


def random_arms(
    folder: Path, specs: list[Architecture], precisions: list[Precision], opsets: list[int], forms: list[Form]
) -> Iterator[Arm]:
    """Every combination with random weights, written into `folder`; labels name what differs. Raises ExportError.

    An unshaped graph is in fp32, whatever the precision.
    """
    for spec, precision, opset, form in product(specs, precisions, opsets, forms):
        words = ((precision, precisions), (f"opset {opset}", opsets), (form, forms))
        label = " ".join([spec.variant, *(str(word) for word, values in words if len(values) > 1)])
        source = random_weights(spec)
        if form == "unshaped":
            graph = to_onnx(source.classifier, opset=opset, shaped=False)
        else:
            graph = make_graph(source, precision, opset=opset)
        model = folder / f"{label.replace(' ', '-')}.onnx"
        model.write_bytes(serialise(graph))
        yield Arm(label=label, model=model, img_size=spec.image_shape[0], attention=attention(spec))


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How to measure; `threads` applies to the CPU only."""

    batches: tuple[int, ...]
    rounds: int
    seconds: float
    threads: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model at one batch size, over all complete rounds; medians over rounds, memory in bytes."""

    arm: Arm
    batch: int
    images_per_s: float
    latency_ms: float
    """Duration of a batch."""
    rates: list[float]
    """Images/s of each round."""
    ratio: Interval
    """Rate relative to the first model."""
    added_bytes: int
    """Peak memory above that of the session before its first run."""
    peak_bytes: int
    cpu_ms: float
    """CPU time of the process per image, which other processes disturb less than they do the rate."""


@dataclass(kw_only=True)
class Measured:
    """All probes so far, in complete rounds."""

    arms: list[Arm]
    setup: Setup
    probes: dict[tuple[str, int], list[Probe]] = field(default_factory=dict)
    rounds: int = 0

    def cells(self) -> Iterator[Cell]:
        """One per model and batch size."""
        for batch, arm in product(self.setup.batches, self.arms):
            probes = self.probes[arm.label, batch][: self.rounds]
            rates = self._rates(arm, batch)
            images_per_s = float(np.median(rates))
            yield Cell(
                arm=arm,
                batch=batch,
                images_per_s=images_per_s,
                latency_ms=1000 * batch / images_per_s,
                rates=rates.round(3).tolist(),
                ratio=paired_ratio(rates, self._rates(self.arms[0], batch)),
                added_bytes=int(np.median([probe.peak_bytes - probe.idle_bytes for probe in probes])),
                peak_bytes=int(np.median([probe.peak_bytes for probe in probes])),
                cpu_ms=1000 * float(np.median([probe.cpu_seconds for probe in probes])) / batch,
            )

    def _rates(self, arm: Arm, batch: int) -> npt.NDArray[np.float64]:
        probes = self.probes[arm.label, batch][: self.rounds]
        return np.array([batch / np.median(probe.seconds) for probe in probes])


def measure(arms: Sequence[Arm], setup: Setup, on_probe: Callable[[str], None]) -> Measured:
    """Run all rounds; `on_probe` is called with a description before each probe.

    Ctrl-C ends it after the current probe and keeps the complete rounds; a second one ends it at once. Raises
    ExportError if a model cannot be run, and KeyboardInterrupt if no round is complete.
    """
    measured = Measured(arms=list(arms), setup=setup)
    interrupted = threading.Event()

    def note_interrupt(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note_interrupt)
    try:
        for number in range(setup.rounds):
            plan = list(product(setup.batches, arms))
            for batch, arm in plan if number % 2 == 0 else plan[::-1]:
                if interrupted.is_set():
                    if not measured.rounds:
                        raise KeyboardInterrupt
                    return measured
                on_probe(f"{arm.label}, batch {batch}, round {number + 1} of {setup.rounds}")
                measured.probes.setdefault((arm.label, batch), []).append(_probe(arm, batch, setup))
            measured.rounds += 1
    finally:
        signal.signal(signal.SIGINT, before)
    return measured


def estimated_seconds(arms: Sequence[Arm], setup: Setup) -> float:
    """Approximate duration of `measure`."""
    return len(arms) * len(setup.batches) * setup.rounds * (setup.seconds + SECONDS_TO_START)


def operators(
    arms: Sequence[Arm], setup: Setup, folder: Path, on_probe: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Seconds per run by operator, for each model at the largest batch size; `folder` receives the traces.

    For each operator, its fastest time in all rounds, which are interleaved as in `measure`. Tracing makes runs slower:
    use the figures for shares of time, not for comparing rates.
    """
    largest, fastest = max(setup.batches), dict[str, dict[str, float]]()
    for number in range(setup.rounds):
        for arm in arms if number % 2 == 0 else arms[::-1]:
            on_probe(f"{arm.label}, batch {largest}, by operator, round {number + 1} of {setup.rounds}")
            found = _probe(arm, largest, setup, trace=folder / "trace").operators
            known = fastest.setdefault(arm.label, found)
            fastest[arm.label] = {name: min(seconds, known.get(name, seconds)) for name, seconds in found.items()}
    return {arm.label: fastest[arm.label] for arm in arms}


def _probe(arm: Arm, batch: int, setup: Setup, *, trace: Path | None = None) -> Probe:
    request = {"model": str(arm.model), "batch": batch, "img_size": arm.img_size, "seconds": setup.seconds}
    request |= {"threads": setup.threads, "device": setup.device, "runtime": arm.runtime}
    request |= {"trace": str(trace) if trace else None}
    command = [sys.executable, "-m", "export.probe", json.dumps(request)]
    # In a session of its own, which the terminal's Ctrl-C does not reach.
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1], start_new_session=True
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ExportError(f"{arm.label} at batch {batch} cannot be measured: {last[0]}")
    return Probe(**json.loads(done.stdout))
