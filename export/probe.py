"""One model timed in a process of its own: `python -m export.probe REQUEST` takes and prints one line of JSON.

The process never imports torch, so that its memory is what serving needs. `profile` starts one per measurement.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from service.engine import INPUT, Engine, resolve_device
from service.engine_timer import time_runs
from service.errors import EngineError
from service.host import gpu_used_bytes, peak_bytes, reset_peak, resident_bytes

Runtime = Literal["onnxruntime", "openvino", "openvino-bf16"]
"""What runs a graph. OpenVINO, in float32 or bfloat16 on a CPU, is for comparison only, not for serving."""

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
    cpu_seconds: float
    """CPU time of the process for a run, on average."""
    operators: dict[str, float] = field(default_factory=dict)
    """Seconds per run by operator, if traced, which makes runs slower; for each node, its fastest run."""


def probe(
    *,
    model: str,
    batch: int,
    img_size: int,
    seconds: float,
    threads: int,
    device: str,
    runtime: Runtime = "onnxruntime",
    trace: str | None = None,
) -> Probe:
    """Run noise (batch,img_size,img_size,3) through `model` repeatedly for `seconds`. Raises EngineError.

    With `trace`, a file name prefix, ONNX Runtime's operators are timed too.
    """
    kind, number = resolve_device(device)
    images = np.random.default_rng(0).integers(0, 256, size=(batch, img_size, img_size, 3), dtype=np.uint8)
    # In a container, processes on a GPU cannot be told apart: the device must be otherwise idle.
    unused = gpu_used_bytes(number) if kind != "cpu" else 0
    engine: Engine | None = None
    if runtime == "onnxruntime":
        engine = Engine(Path(model), device=kind, number=number, threads=threads, trace=Path(trace) if trace else None)
        run = engine.bind(images)
    else:
        run = _openvino(model, images, threads=threads, precision="bf16" if runtime == "openvino-bf16" else "f32")
    if kind == "cpu":
        idle = resident_bytes()
        reset_peak()
    else:
        idle = gpu_used_bytes(number) - unused
    for _ in range(WARM_UP_RUNS):
        run()
    cpu = time.process_time()
    taken = time_runs(run, seconds=seconds, warm_up_runs=0)
    cpu_seconds = (time.process_time() - cpu) / len(taken)
    # ONNX Runtime's arena on a GPU never shrinks: its present size is its peak.
    peak = peak_bytes() if kind == "cpu" else gpu_used_bytes(number) - unused
    operators = _by_operator(engine.end_trace()) if engine and trace else {}
    return Probe(seconds=taken, idle_bytes=idle, peak_bytes=peak, cpu_seconds=cpu_seconds, operators=operators)


def _openvino(model: str, images: npt.NDArray[np.uint8], *, threads: int, precision: str) -> Callable[[], object]:
    """A function that runs `images` in OpenVINO. Raises EngineError."""
    try:
        import openvino  # noqa: PLC0415 (only `profile` needs it, and only for this)
    except ImportError as error:
        raise EngineError("OpenVINO is not installed: pip install openvino") from error
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    try:
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot compile it: {error}") from error
    return lambda: request.infer({INPUT: images}, share_inputs=True, share_outputs=True)


def _by_operator(trace: Path) -> dict[str, float]:
    """Seconds of each kind of node, largest first, from ONNX Runtime's trace; for each node, its fastest run."""
    fastest: dict[tuple[str, str], float] = {}
    for event in json.loads(trace.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = event["args"]["op_name"], event["name"]
            fastest[node] = min(event["dur"] / 1e6, fastest.get(node, math.inf))
    seconds: dict[str, float] = {}
    for (operator, _), taken in fastest.items():
        seconds[operator] = seconds.get(operator, 0.0) + taken
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(probe(**json.loads(sys.argv[1])))))
    except EngineError as error:
        sys.exit(" ".join(str(error).split()))
