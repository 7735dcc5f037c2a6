"""One model timed in a process of its own: `python -m export.probe MODEL --batch 8` prints one line of JSON.

The process never imports torch, so that its memory is what serving needs. `profile` starts one for each measurement.
"""

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from service.engine import Engine, resolve_device
from service.errors import EngineError

WARM_UP_RUNS = 2
PEAK_RESETTER = Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one process saw. Memory in bytes: of the process on a CPU, of the device on a GPU."""

    seconds: list[float]
    """Of each run of a whole batch, after the warm-up."""
    idle_bytes: int
    """With the session loaded, before its first run."""
    peak_bytes: int
    """The most since then."""
    operators: dict[str, float] = field(default_factory=dict)
    """Seconds of a run by operator, if they were asked for: tracing them makes a run slower."""


def probe(
    model: Path, *, batch: int, size: int, seconds: float, threads: int, device: str, trace: Path | None = None
) -> Probe:
    """Run noise (batch,size,size,3) through `model` again and again for `seconds`. Raises EngineError.

    With `trace`, operators are timed too, by way of a file whose name begins so.
    """
    kind, number = resolve_device(device)
    images = np.random.default_rng(0).integers(0, 256, size=(batch, size, size, 3), dtype=np.uint8)
    unused = _device_bytes(number) if kind != "cpu" else 0
    engine = Engine(model, device=kind, number=number, threads=threads, trace=trace)
    run = engine.bind(images)
    if kind == "cpu":
        idle = _process_bytes("VmRSS")
        PEAK_RESETTER.write_text("5", encoding="ascii")
    else:
        idle = _device_bytes(number) - unused
    for _ in range(WARM_UP_RUNS):
        run()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or not taken:
        run()
        taken.append(time.perf_counter() - start)
    # ONNX Runtime's arena on a GPU never shrinks: what it holds now is its peak.
    peak = _process_bytes("VmHWM") if kind == "cpu" else _device_bytes(number) - unused
    operators = _by_operator(engine.end_trace(), runs=WARM_UP_RUNS + len(taken)) if trace else {}
    return Probe(seconds=taken, idle_bytes=idle, peak_bytes=peak, operators=operators)


def _by_operator(trace: Path, *, runs: int) -> dict[str, float]:
    """Seconds of each kind of node in a run, most first, from ONNX Runtime's trace."""
    seconds: Counter[str] = Counter()
    for event in json.loads(trace.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            seconds[event["args"]["op_name"]] += event["dur"] / 1e6
    return {name: total / runs for name, total in seconds.most_common()}


def _process_bytes(field: str) -> int:
    """`VmRSS`, memory held now, or `VmHWM`, the most held since the process started or PEAK_RESETTER was written."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _device_bytes(number: int) -> int:
    """Memory in use on a whole GPU, which must be otherwise idle: a container's processes cannot be told apart."""
    import pynvml  # noqa: PLC0415 (installed with the extra `gpu` only)

    pynvml.nvmlInit()
    used: int = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(number)).used
    return used


def main(
    model: Annotated[Path, typer.Argument()],
    batch: int = 1,
    size: int = 224,
    seconds: float = 2.0,
    threads: int = 1,
    device: str = "cpu",
    trace: Path | None = None,
) -> None:
    """Print one Probe as JSON; or, to standard error, why there is none, in one line."""
    try:
        seen = probe(model, batch=batch, size=size, seconds=seconds, threads=threads, device=device, trace=trace)
    except EngineError as error:
        typer.echo(" ".join(str(error).split()), err=True)
        raise typer.Exit(1) from None
    typer.echo(json.dumps(asdict(seen)))


if __name__ == "__main__":
    typer.run(main)
