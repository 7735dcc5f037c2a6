"""Calls from other threads to the event loop, where futures and counters are changed."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any


def call_on_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    """Have `function` called on the event loop, soon; from any thread."""
    # On a closed loop, nobody waits any longer.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)
