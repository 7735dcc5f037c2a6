"""SIGTERM and Ctrl-C as requests that a run honours between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """A signal ended the run early; its state after the last step is saved."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """`signum` is the signal that was received, or 0."""

    signum = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record SIGTERM and SIGINT instead of ending; a second SIGINT raises KeyboardInterrupt at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def remember(signum: int, _: FrameType | None) -> None:
        request.signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, remember)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
