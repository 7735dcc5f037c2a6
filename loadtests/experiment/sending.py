"""Requests of which none may be left out, several at a time. Loads, whose timing counts, are Locust's."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import httpx

from loadtests.generator.load_result import ANSWER_SECONDS

T = TypeVar("T")


def send_all(
    url: str, items: Iterable[T], send: Callable[[httpx.AsyncClient, T], Awaitable[None]], *, connections: int
) -> None:
    """Await `send` for every item, `connections` of them at a time, each taken when it is its turn.

    The first exception, Ctrl-C or SIGTERM cancels those in flight.
    """
    waiting, limits = iter(items), httpx.Limits(max_connections=connections, max_keepalive_connections=connections)

    async def work(client: httpx.AsyncClient) -> None:
        for item in waiting:
            await send(client, item)

    async def work_all() -> None:
        # asyncio turns Ctrl-C into a cancellation: a termination must do the same.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
        # A proxy of the environment must not come between.
        http = httpx.AsyncClient(base_url=url, limits=limits, timeout=ANSWER_SECONDS, trust_env=False)
        async with http as client, asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(work(client))

    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        asyncio.run(work_all())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
