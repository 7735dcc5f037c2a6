"""Logging that neither blocks nor fails a request: a bounded queue of lines, and one thread that writes them.

structlog, `logging` (uvicorn, warnings), exceptions of threads and what native libraries write to standard error all
go this way. The queue listener of the standard library is no substitute: its handler prints a traceback to standard
error when the queue is full, and stopping it waits without limit for a reader that may never come.
"""

import itertools
import logging
import os
import select
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, Self

import structlog
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

STDERR: Final = 2
_WRITE_BYTES = 64 * 1024
"""Lines are joined up to this size and written in one system call."""
_MAX_NATIVE_LINE_BYTES = 16 * 1024
"""Longer lines of native libraries are split: output without a line break would be buffered without bound."""


class LineQueue:
    """Lines on their way to a file descriptor. `put` neither blocks nor raises; lines without room are counted."""

    def __init__(self, fd: int, *, max_bytes: int, report: Callable[[int], str]) -> None:
        """`report`: the line that says how many lines were dropped, written once the descriptor takes lines again."""
        self.max_bytes = max_bytes
        self._fd, self._report = fd, report
        self._lines: deque[bytes] = deque()
        self._pending_bytes = 0
        self._dropped = self._unreported = 0
        self._closed = self._in_mid_line = False
        # Its default lock is reentrant: a signal handler may log while its thread is in `put`.
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines lost so far: for lack of room, or because writing failed."""
        return self._dropped

    def put(self, line: str) -> None:
        """Take a line, or drop it."""
        encoded = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._changed:
            if self._closed or self._pending_bytes + len(encoded) > self.max_bytes:
                self._drop(1)
                return
            self._lines.append(encoded)
            self._pending_bytes += len(encoded)
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait at most `seconds` until all lines are written, and return whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending_bytes, seconds)

    def close(self, seconds: float) -> bool:
        """Take no more lines, write the remaining ones within `seconds`, and return whether that succeeded."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _drop(self, lines: int) -> None:
        self._dropped += lines
        self._unreported += lines

    def _run(self) -> None:
        while lines := self._next():
            whole = self._write(lines)
            with self._changed:
                self._drop(len(lines) - whole)
                self._pending_bytes -= sum(map(len, lines))
                unreported = 0 if self._lines or whole < len(lines) else self._unreported
                self._changed.notify_all()
            if unreported and self._write([self._report(unreported).encode() + b"\n"]):
                with self._changed:
                    self._unreported -= unreported

    def _next(self) -> list[bytes]:
        """The lines to write next; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closed)
            lines: list[bytes] = []
            size = 0
            while self._lines and size < _WRITE_BYTES:
                lines.append(self._lines.popleft())
                size += len(lines[-1])
            return lines

    def _write(self, lines: list[bytes]) -> int:
        """Write the lines, and return how many of them were written whole."""
        # A line that an earlier failure cut short must not run into the next one.
        separator = b"\n" if self._in_mid_line else b""
        data = memoryview(separator + b"".join(lines))
        written = 0
        try:
            while written < len(data):
                try:
                    written += os.write(self._fd, data[written:])
                except BlockingIOError:
                    # Another process made the descriptor non-blocking.
                    poll = select.poll()
                    poll.register(self._fd, select.POLLOUT)
                    poll.poll()
        except OSError:
            # The disk is full, or the reader is gone: only the metric can report it.
            self._in_mid_line = self._in_mid_line if written == 0 else data[written - 1] != ord("\n")
        else:
            self._in_mid_line = False
        ends = itertools.accumulate(map(len, lines))
        return sum(end + len(separator) <= written for end in ends)


class StderrTap:
    """Takes over file descriptor 2: each line that anything in this process writes there is passed on.

    ONNX Runtime and image libraries write there from the threads that compute. Writing straight to a pipe that nobody
    reads would block these threads.
    """

    def __init__(self) -> None:
        """From here on `original` is where standard error went before."""
        self.original = os.dup(STDERR)
        self._read_end, write_end = os.pipe()
        os.dup2(write_end, STDERR)
        os.close(write_end)
        self._thread: threading.Thread | None = None

    def start(self, take: Callable[[str], None]) -> None:
        """Pass lines on to `take`, from a thread of its own."""
        self._thread = threading.Thread(target=self._run, args=(take,), name="stderr", daemon=True)
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Pass on what was written so far. What is written later is lost, unless `restore` follows."""
        null = os.open(os.devnull, os.O_WRONLY)
        # This closes the pipe's last write end, unless a child process has one.
        os.dup2(null, STDERR)
        os.close(null)
        if self._thread:
            self._thread.join(seconds)

    def restore(self) -> None:
        """Let standard error go where it went before."""
        os.dup2(self.original, STDERR)
        os.close(self.original)

    def _run(self, take: Callable[[str], None]) -> None:
        with open(self._read_end, "rb") as stream:  # noqa: PTH123 (a descriptor is no path)
            while line := stream.readline(_MAX_NATIVE_LINE_BYTES):
                if text := line.decode("utf-8", "replace").strip():
                    take(text)


class Logs(Collector):
    """The logging of this process, as a context: JSON lines on standard error, or coloured text on a terminal.

    As a collector it gives the metric of dropped lines.
    """

    def __init__(self, level: str = "info", *, buffer_bytes: int = 1 << 20, flush_seconds: float = 2.0) -> None:
        self._level, self._buffer_bytes, self._flush_seconds = level, buffer_bytes, flush_seconds
        self._tap: StderrTap | None = None
        self._queue: LineQueue | None = None
        self._renderers: list[Any] = []

    def adjust(self, *, level: str, buffer_bytes: int, flush_seconds: float) -> None:
        """Apply the settings once they are read. Loggers that were used before keep their level."""
        self._level, self._buffer_bytes, self._flush_seconds = level, buffer_bytes, flush_seconds
        if self._queue:
            self._queue.max_bytes = buffer_bytes
            self._configure(self._queue)

    def collect(self) -> Iterator[Metric]:
        """The metric."""
        text = "Log lines that were not written: their reader was too slow, or writing failed."
        dropped = self._queue.dropped if self._queue else 0
        yield CounterMetricFamily("stridevit_log_lines_dropped", text, value=dropped)

    def __enter__(self) -> Self:
        self._install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._queue and self._tap:
            if sys.stderr:
                sys.stderr.flush()
            self._tap.stop(self._flush_seconds)
            if self._queue.close(self._flush_seconds):
                self._tap.restore()

    def _install(self) -> None:
        open_standard_streams()
        self._tap = StderrTap()
        on_terminal = os.isatty(self._tap.original)
        # Locals in a traceback would show the hashes of keys.
        console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        self._renderers = (
            [console] if on_terminal else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        )
        self._queue = LineQueue(self._tap.original, max_bytes=self._buffer_bytes, report=self._report)
        self._configure(self._queue)
        self._tap.start(self._pass_on)
        logging.captureWarnings(True)
        # Pillow warns about odd metadata in clients' files.
        warnings.filterwarnings("ignore", module="PIL")
        # One warning for each malformed form would let clients flood the log.
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        threading.excepthook = _on_thread_exception
        sys.unraisablehook = _on_unraisable

    def _configure(self, queue: LineQueue) -> None:
        number = logging.getLevelNamesMapping()[self._level.upper()]
        structlog.configure(
            processors=[*_SHARED, *self._renderers],
            wrapper_class=structlog.make_filtering_bound_logger(number),
            logger_factory=lambda *_: _QueueLogger(queue),
            cache_logger_on_first_use=True,
        )
        logging.basicConfig(
            level=max(number, logging.INFO),
            handlers=[_QueueHandler(queue, self._renderers, self._flush_seconds)],
            force=True,
        )

    def _report(self, dropped: int) -> str:
        return self._line("warning", f"{dropped} log lines were dropped", dropped=dropped)

    def _pass_on(self, text: str) -> None:
        if self._queue:
            # A line of a child process may be rendered already.
            self._queue.put(text if text.startswith("{") else self._line("warning", text, logger="stderr"))

    def _line(self, level: str, text: str, **values: Any) -> str:
        event: Any = {"event": text, **values}
        for process in (*_SHARED[1:], *self._renderers):
            event = process(None, level, event)
        return str(event)


_SHARED: Final[list[Any]] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


class _QueueLogger:
    """What structlog calls with a rendered event."""

    def __init__(self, queue: LineQueue) -> None:
        self.msg = self.debug = self.info = self.warning = self.error = self.critical = self.exception = queue.put
        self.log = self.warn = self.fatal = self.failure = self.err = queue.put


class _QueueHandler(logging.Handler):
    """`logging` into the queue."""

    def __init__(self, queue: LineQueue, renderers: list[Any], flush_seconds: float) -> None:
        super().__init__()
        self._queue, self._flush_seconds = queue, flush_seconds
        remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
        self.setFormatter(
            structlog.stdlib.ProcessorFormatter(processors=[remove, *renderers], foreign_pre_chain=_SHARED)
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Render and queue a record."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 (the caller's: its arguments do not fit its text)
            place = record.pathname, record.lineno
            line = self.format(logging.LogRecord(record.name, logging.ERROR, *place, repr(record.msg), (), None))
        self._queue.put(line)

    def flush(self) -> None:
        """Wait for the lines so far, within the time limit; `logging.shutdown()` calls it before a hard exit."""
        self._queue.flush(self._flush_seconds)


def leave_at_once(status: int) -> None:
    """End the process whatever its threads do, once its log lines are written."""
    try:
        logging.shutdown()
    finally:
        os._exit(status)


def open_standard_streams() -> None:
    """Give descriptors 0 to 2 to the null device where they are closed.

    Otherwise the next socket or file would get such a number, and what is written to standard error would go there.
    """
    for number in range(STDERR + 1):
        try:
            os.fstat(number)
        except OSError:
            # The system gives out the lowest free number.
            os.open(os.devnull, os.O_RDWR)


def _on_thread_exception(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = args.thread.name if args.thread else ""
        structlog.get_logger().error("a thread ended by an exception", thread=name, exc_info=args.exc_value)


def _on_unraisable(args: Any) -> None:
    structlog.get_logger().error(args.err_msg or "an exception was ignored", exc_info=args.exc_value)
