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

    After an exception of one the others in flight are awaited still; an interruption cancels them.
    """
    waiting, limits = iter(items), httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    errors: list[Exception] = []

    async def work(client: httpx.AsyncClient) -> None:
        try:
            for item in waiting:
                if errors:
                    return
                await send(client, item)
        except Exception as error:  # noqa: BLE001 (raised below)
            errors.append(error)

    async def work_all() -> None:
        # A proxy of the environment must not come between.
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=ANSWER_SECONDS, trust_env=False) as client:
            await asyncio.gather(*(work(client) for _ in range(connections)))

    asyncio.run(work_all())
    if errors:
        raise errors[0]
