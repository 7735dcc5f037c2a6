"""Has bundles proven by a separate process (`service.models.trial`), and reports the outcome."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from service.errors import BundleError, NotNow
from service.models.machine import is_out_of_memory
from service.models.proof import EngineOptions, Proof
from service.models.trial import REQUESTS, RESULTS, Request, Result

_GRACE_SECONDS = 5
"""Time beyond the limit until the process's own timer ends it: normally this process ends it first, and says why."""

_END_SECONDS = 5
"""Time that an idle process has to end before it is killed."""

_MORE_MEMORY = 1.25
"""A version that ran out of memory is proven again once this many times the memory is left: what is left fluctuates."""

_TAIL_BYTES = 2000
"""How much of the end of the process's standard error is kept: enough for its last message."""


class Prover:
    """Proves bundles one after the other in one process, which is started when needed and ends with `rest`."""

    def __init__(self, options: EngineOptions, *, seconds: float) -> None:
        """`seconds`: time limit of one proof, the start of the process included."""
        self._options, self._seconds = options, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._change = threading.Lock()

    def prove(
        self,
        folder: Path,
        scratch: Path | None,
        *,
        memory_bytes: int | None,
        known: Proof | None = None,
        background: bool = False,
    ) -> Proof:
        """Prove a bundle within `memory_bytes`, or without a limit for None. Blocks; for one thread at a time.

        Packed weights are left in `scratch`; with a `known` proof there is nothing else to do: see
        `service.models.proof.prove`. In the `background`, it yields the cores to all other work.
        Raises BundleError with the reason why there is no proof, or NotNow if it is not the bundle's fault.
        """
        request = Request(
            folder=folder.absolute(),
            scratch=scratch,
            known=known,
            options=self._options,
            memory_bytes=memory_bytes,
            background=background,
            seconds=self._seconds + _GRACE_SECONDS,
        )
        if self._process is not None and self._process.poll() is not None:
            self.rest()  # it has ended since its last answer
        process = self._started()
        proven = False
        try:
            result = self._ask(process, REQUESTS.dump_json(request) + b"\n", folder)
            proven = result.proof is not None
        finally:
            if not proven:
                # It may be in any state, and hold any amount of memory.
                self.rest()
        if result.proof is None:
            if result.out_of_memory:
                raise _out_of_memory(folder, memory_bytes, result.error)
            # The path as the caller gave it.
            raise BundleError(result.error.replace(str(folder.absolute()), str(folder)))
        return result.proof

    def rest(self) -> None:
        """End the process, which frees what it holds; the next proof starts another one."""
        with self._change:
            process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                # Closing the input would flush to the process what was left to write.
                with contextlib.suppress(BrokenPipeError):
                    _present(stream).close()

    def close(self) -> None:
        """End the proof that is running, and allow no other. From any thread."""
        with self._change:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def _started(self) -> "subprocess.Popen[bytes]":
        with self._change:
            if self._closed:
                raise NotNow("the service is shutting down")
            if self._process is None:
                try:
                    # In a session of its own: Ctrl-C reaches only this process, which then ends that one.
                    self._process = subprocess.Popen(
                        [sys.executable, "-m", "service.models.trial"],
                        cwd=Path(__file__).parents[2],
                        # Threads of other libraries would only take memory: a model uses the engine's.
                        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        start_new_session=True,
                    )
                except OSError as error:
                    raise NotNow(f"the process for proofs cannot be started ({error.strerror})") from error
            return self._process

    def _ask(self, process: "subprocess.Popen[bytes]", request: bytes, folder: Path) -> Result:
        deadline = time.monotonic() + self._seconds
        stdin, stdout, stderr = map(_present, (process.stdin, process.stdout, process.stderr))
        answer, words = bytearray(), bytearray()
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its output says so
            stdin.write(request)
            stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ, answer)
            selector.register(stderr, selectors.EVENT_READ, words)
            while not answer.endswith(b"\n"):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready and time.monotonic() >= deadline:
                    process.kill()
                    raise BundleError(
                        f"{folder}: its proof did not finish within {self._seconds:g} s: raise "
                        "load_timeout_seconds if the model is merely slow"
                    )
                for key, _ in ready:
                    chunk = os.read(key.fd, 65536)
                    key.data.extend(chunk)
                    if not chunk:
                        selector.unregister(key.fileobj)
                        if key.fileobj is stdout:
                            return self._ended(process, _last_words(words + _rest(stderr)), folder)
                del words[:-_TAIL_BYTES]
        return RESULTS.validate_json(answer)

    def _ended(self, process: "subprocess.Popen[bytes]", words: str, folder: Path) -> Result:
        """The process has ended instead of answering."""
        status = process.wait()
        if self._closed:
            raise NotNow("the service is shutting down")
        if is_out_of_memory(words):
            return Result(error=words, out_of_memory=True)
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        if name == "SIGKILL":
            # Nothing else kills it.
            return Result(error="it was killed by the system", out_of_memory=True)
        return Result(error=f"{folder}: the process that loaded it ended with {name}{words and ': ' + words}")


def _out_of_memory(folder: Path, memory_bytes: int | None, error: str) -> NotNow:
    left = "there is" if memory_bytes is None else f"the {memory_bytes >> 20} MiB that are left"
    return NotNow(
        f"{folder}: loading it takes more memory than {left} ({_last_words(error.encode())})",
        needed_bytes=round((memory_bytes or 0) * _MORE_MEMORY),
    )


def _present(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise ValueError("the process has no pipe there")
    return stream


def _rest(stream: IO[bytes]) -> bytes:
    """What is left in the pipe of a process that has ended."""
    return stream.read(_TAIL_BYTES) or b""


def _last_words(text: bytes | bytearray) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[-500:] if lines else ""
