"""Requests of which none may be left out, some of them at a time. Loads, whose timing counts, are Locust's."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import httpx

from loadtests.generator.load_result import ANSWER_SECONDS

T = TypeVar("T")


def send_all(
    url: str, items: Iterable[T], send: Callable[[httpx.AsyncClient, T], Awaitable[None]], *, connections: int
) -> None:
    """Await `send` for every item, `connections` of them at a time, each taken when it is its turn.

    An exception ends one connection, and is raised when all have ended; an interruption cancels what is in flight.
    """
    waiting, limits = iter(items), httpx.Limits(max_connections=connections, max_keepalive_connections=connections)

    async def work(client: httpx.AsyncClient) -> None:
        for item in waiting:
            await send(client, item)

    async def work_all() -> list[BaseException | None]:
        # A proxy of the environment must not come between.
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=ANSWER_SECONDS, trust_env=False) as client:
            return await asyncio.gather(*(work(client) for _ in range(connections)), return_exceptions=True)

    for error in filter(None, asyncio.run(work_all())):
        raise error
