"""`python -m service.models.trial`: the process that proves bundles, so that a bad one does not harm the others.

A graph may loop, or take all memory, or crash the process in native code; whatever it does, it does it here, within
limits of memory and time, and next to traffic at low priority. Requests come as JSON lines on standard input
(`Request`), answers go as JSON lines to standard output (`Result`). The process ends when its input does, so it ends
with the one that started it.
"""

import os
import queue
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from service.engine import resolve_device
from service.errors import ServiceError
from service.host import data_bytes
from service.models.machine import is_out_of_memory
from service.models.proof import EngineOptions, Proof, prove

_NICE = 10
"""A tenth of a core where the service keeps all of them busy, and all that it leaves free. With an even lower priority,
a busy service could load nothing within the time limit."""

_SLACK_BYTES, _STACK_BYTES = 64 * 1024 * 1024, 8 * 1024 * 1024
"""What counts as private memory but is not used: reserved by the C library, and the stack of each thread."""

_THREADS_PER_CORE = 3
"""Those of all layouts that pay off, each with half the threads of the one before it, and a lane for each core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A bundle to prove."""

    folder: Path
    scratch: Path | None
    """Folder to leave the packed weights in."""
    options: EngineOptions
    known: Proof | None
    """An earlier proof of the same content: only packed weights are needed."""
    memory_bytes: int | None
    """What it may take; None for no limit."""
    background: bool
    """Whether other models take traffic, which goes first."""
    seconds: float
    """After which the process ends itself, should nobody be left to end it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The proof, or why there is none."""

    proof: Proof | None = None
    error: str = ""
    out_of_memory: bool = False


REQUESTS, RESULTS = TypeAdapter(Request), TypeAdapter(Result)


def main() -> None:
    """Answer requests until standard input ends."""
    # What libraries print goes to standard error: only answers go to the output.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if sys.platform != "win32":
        # If memory runs out, the system is to kill this process rather than the one that serves.
        _write("/proc/self/oom_score_adj", "1000")
    # Loads ONNX Runtime, whose own memory does not count as a model's.
    resolve_device("cpu")
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    nice = False
    while True:
        request = REQUESTS.validate_json(requests.get())
        if request.background and not nice:
            nice = True
            _stand_back()
        result = _answer(request)
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(RESULTS.dump_json(result) + b"\n")
        answers.flush()


def _stand_back() -> None:
    """Lower the priority, for good: a process may not raise its own."""
    if sys.platform != "win32":
        os.nice(_NICE)
        # Linux may divide the cores among sessions first, and this process has its own.
        _write("/proc/self/autogroup", str(_NICE))


def _read(requests: "queue.SimpleQueue[bytes]") -> None:
    """Runs in a thread of its own, so that the end of the input ends the process whatever the main thread does."""
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(0)


def _answer(request: Request) -> Result:
    _limit(request)
    try:
        return Result(proof=prove(request.folder, request.options, request.scratch, known=request.known))
    except MemoryError:
        return Result(error="out of memory", out_of_memory=True)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is why this bundle cannot be served)
        text = str(error) if isinstance(error, ServiceError) else f"{type(error).__name__}: {error}"
        return Result(error=text, out_of_memory=is_out_of_memory(error))


def _limit(request: Request) -> None:
    if sys.platform == "win32":
        return
    import resource  # noqa: PLC0415 (not on Windows)

    # The default action of the signal ends the process even within native code.
    signal.setitimer(signal.ITIMER_REAL, request.seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = resource.RLIM_INFINITY
    if request.memory_bytes is not None:
        # Not RLIMIT_AS: the C library and CUDA reserve address space that they never use.
        limit = (
            data_bytes()
            + request.memory_bytes
            + _SLACK_BYTES
            + _THREADS_PER_CORE * request.options.cores * _STACK_BYTES
        )
    if hard != resource.RLIM_INFINITY and (limit == resource.RLIM_INFINITY or limit > hard):
        limit = hard
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _write(file: str, text: str) -> None:
    try:
        Path(file).write_text(text, encoding="ascii")
    except OSError:  # not Linux, or not allowed here
        return


if __name__ == "__main__":
    main()
