"""An event loop on a thread of its own, for work that blocks its caller and can be ended from anywhere."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, wait
from typing import Any, TypeVar

_T = TypeVar("_T")
_END_SECONDS = 10.0
"""How long `close` waits for cancelled work to clean up."""
_LOOK_SECONDS = 1.0


class LoopThread:
    """Runs coroutines for other threads. Its thread is a daemon, and ends with `close`."""

    def __init__(self, name: str, *, at_end: Callable[[], Awaitable[None]]) -> None:
        """`at_end` runs last on the loop, after everything else was cancelled."""
        self._at_end = at_end
        self._started, self._ended = threading.Event(), threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name=name, daemon=True)
        self._thread.start()
        self._started.wait()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of `work`. Ctrl-C, or another signal that raises, ends all work first.

        Raises CancelledError (of concurrent.futures) once it is closed.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop is closed
            work.close()
            raise CancelledError from None
        try:
            while True:
                wait([future], timeout=_LOOK_SECONDS)
                if future.done():
                    return future.result()
                if not self._thread.is_alive():  # it ended just before
                    raise CancelledError
        except (KeyboardInterrupt, SystemExit):
            self.close()
            raise

    def close(self) -> None:
        """Cancel all work and wait for its end. From any thread but its own, and from a signal's handler."""
        if not self._ended.is_set():
            self._ended.set()
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_END_SECONDS)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        await self._stop.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._at_end()
