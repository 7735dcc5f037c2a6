"""The least memory that a model needs: PSS of a process that holds ONNX Runtime and the model alone, on the CPU.

`python -m service.engine_memory` is that process. It imports nothing else of the service, as that would count too.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from service.engine import Engine
from service.errors import EngineError
from service.host import pss_bytes

if TYPE_CHECKING:
    from service.bundle import Bundle

_TIMEOUT_SECONDS = 300


def measure_memory(bundle: "Bundle", *, threads: int, batch: int) -> tuple[int | None, int | None]:
    """PSS in bytes after a run of one image, and after a run of `batch`; None where the system does not report it.

    Call it before this process loads ONNX Runtime: PSS divides memory that processes share among them. Raises
    EngineError.
    """
    if pss_bytes() is None:
        return None, None
    arguments = [str(bundle.model_path.resolve()), *map(str, (bundle.manifest.input.shape[1], threads, batch))]
    command = [sys.executable, "-m", "service.engine_memory", *arguments]
    try:
        ended = subprocess.run(  # noqa: S603 (our own command)
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True
        )
    except subprocess.SubprocessError as error:
        log = getattr(error, "stderr", None) or ""
        raise EngineError(
            f"the process with ONNX Runtime and the model alone failed: {error}\n{log[-1000:]}"
        ) from error
    one, largest = json.loads(ended.stdout)
    return one, largest


def _main(model: str, side: int, threads: int, batch: int) -> None:
    engine, memory = Engine(Path(model), threads=threads), []
    for size in (1, batch):
        engine.run(np.zeros((size, side, side, 3), np.uint8))
        memory.append(pss_bytes())
    sys.stdout.write(json.dumps(memory))


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:]))
