"""One model timed in a process of its own: `python -m export.probe REQUEST` takes and prints one line of JSON.

The process never imports torch, so that its memory is what serving needs. `profile` starts one per measurement.
"""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from service.engine import Engine, resolve_device
from service.engine_timer import time_runs
from service.errors import EngineError
from service.host import gpu_used_bytes, peak_bytes, reset_peak, resident_bytes

WARM_UP_RUNS = 2


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One measurement. Memory in bytes: of the process on a CPU, of the whole device on a GPU."""

    seconds: list[float]
    """Duration of each run of a whole batch, after the warm-up."""
    idle_bytes: int
    """Memory with the session loaded, before its first run."""
    peak_bytes: int
    """Largest memory since then."""
    operators: dict[str, float] = field(default_factory=dict)
    """Seconds per run by operator, where they were traced, which makes a run slower."""


def probe(
    *, model: str, batch: int, img_size: int, seconds: float, threads: int, device: str, trace: str | None = None
) -> Probe:
    """Run noise (batch,img_size,img_size,3) through `model` repeatedly for `seconds`. Raises EngineError.

    With `trace`, the prefix of a file, operators are timed too.
    """
    kind, number = resolve_device(device)
    images = np.random.default_rng(0).integers(0, 256, size=(batch, img_size, img_size, 3), dtype=np.uint8)
    # A container cannot tell processes on a GPU apart: the device must be otherwise idle.
    unused = gpu_used_bytes(number) if kind != "cpu" else 0
    engine = Engine(Path(model), device=kind, number=number, threads=threads, trace=Path(trace) if trace else None)
    run = engine.bind(images)
    if kind == "cpu":
        idle = resident_bytes()
        reset_peak()
    else:
        idle = gpu_used_bytes(number) - unused
    taken = time_runs(run, seconds=seconds, warm_up_runs=WARM_UP_RUNS)
    # ONNX Runtime's arena on a GPU never shrinks: its present size is its peak.
    peak = peak_bytes() if kind == "cpu" else gpu_used_bytes(number) - unused
    operators = _by_operator(engine.end_trace(), runs=WARM_UP_RUNS + len(taken)) if trace else {}
    return Probe(seconds=taken, idle_bytes=idle, peak_bytes=peak, operators=operators)


def _by_operator(trace: Path, *, runs: int) -> dict[str, float]:
    """Seconds per run of each kind of node, largest first, from ONNX Runtime's trace."""
    seconds: Counter[str] = Counter()
    for event in json.loads(trace.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            seconds[event["args"]["op_name"]] += event["dur"] / 1e6
    return {name: total / runs for name, total in seconds.most_common()}


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(probe(**json.loads(sys.argv[1])))))
    except EngineError as error:
        sys.exit(" ".join(str(error).split()))
