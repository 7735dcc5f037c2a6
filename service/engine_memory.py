"""The least memory that a model needs: PSS of a process that holds ONNX Runtime and the model alone, on the CPU.

`python -m service.engine_memory MODEL SIDE THREADS BATCH` is that process. It imports little else, for that would count
too: the session is made here, with the options of `service.engine`.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from service.host import pss_bytes

_TIMEOUT_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """PSS in bytes after a run of one image, and after a run of the largest batch."""

    one_image_bytes: int
    largest_batch_bytes: int


def measure_memory(model: Path, *, side: int, threads: int, batch: int) -> EngineMemory | None:
    """Measure a model whose images are side × side in a fresh process; None where the system does not report PSS.

    Raises subprocess.SubprocessError. Call it before this process loads ONNX Runtime: what processes share is divided
    among them, and half of it would be missing.
    """
    if pss_bytes() is None:
        return None
    command = [sys.executable, "-m", "service.engine_memory", str(model.resolve()), *map(str, (side, threads, batch))]
    ended = subprocess.run(  # noqa: S603 (our own command)
        command,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=True,
    )
    return EngineMemory(**json.loads(ended.stdout))


def _main(model: str, side: int, threads: int, batch: int) -> None:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import numpy as np  # noqa: PLC0415 (only in the process that is measured)
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level, options.enable_mem_pattern = 3, False
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    memory = []
    for size in (1, batch):
        session.run(None, {name: np.zeros((size, side, side, 3), np.uint8)})
        memory.append(pss_bytes())
    sys.stdout.write(json.dumps({"one_image_bytes": memory[0], "largest_batch_bytes": memory[1]}))


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:]))
