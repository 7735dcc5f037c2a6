"""Send requests of which none may be left out, several at a time. Loads, whose timing counts, are sent by Locust."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import httpx

from loadtests.generator.load_result import ANSWER_SECONDS

T = TypeVar("T")

_GRACE_SECONDS = 2.0
"""A connection that is being made when it is cancelled would stay open."""


def send_all(
    url: str, items: Iterable[T], send: Callable[[httpx.AsyncClient, T], Awaitable[None]], *, connections: int
) -> None:
    """Await `send` for every item, `connections` of them at a time, each taken only when it is its turn.

    After an exception those in flight have `_GRACE_SECONDS` to end; Ctrl-C and SIGTERM cancel them.
    """
    waiting, limits = iter(items), httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    failed = False

    async def work(client: httpx.AsyncClient) -> None:
        for item in waiting:
            if failed:
                return
            await send(client, item)

    async def work_all() -> None:
        nonlocal failed
        # No proxy that the environment names may come between.
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=ANSWER_SECONDS, trust_env=False) as client:
            workers = [asyncio.create_task(work(client)) for _ in range(connections)]
            try:
                ended, others = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
                if others:
                    failed = True
                    await asyncio.wait(others, timeout=_GRACE_SECONDS)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
            for worker in ended:
                worker.result()

    run_interruptibly(work_all())


def run_interruptibly(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; Ctrl-C and SIGTERM cancel it, and raise KeyboardInterrupt."""

    async def guarded() -> T:
        # asyncio turns Ctrl-C into a cancellation: SIGTERM must do the same.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
        return await work

    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        return asyncio.run(guarded())
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
