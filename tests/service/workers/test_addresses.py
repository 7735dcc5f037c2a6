"""Whose address a request has behind the front."""

import asyncio

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from service.http.server.protocol import UNIX_PEER


@pytest.mark.parametrize(
    ("trusted", "forwarded", "client"),
    [
        ([], "1.2.3.4", "1.2.3.4"),
        # What the client wrote itself comes before what the front adds.
        ([], "6.6.6.6, 1.2.3.4", "1.2.3.4"),
        (["10.0.0.0/8"], "6.6.6.6, 1.2.3.4, 10.0.0.9", "1.2.3.4"),
    ],
)
def test_it_is_what_the_front_appended_unless_that_is_a_trusted_proxy(
    trusted: list[str], forwarded: str, client: str
) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["client"][0])

    scope = {
        "type": "http",
        "scheme": "http",
        "client": (UNIX_PEER, 0),
        "headers": [(b"x-forwarded-for", forwarded.encode())],
    }
    middleware = ProxyHeadersMiddleware(app, trusted_hosts=[UNIX_PEER, *trusted])  # type: ignore[arg-type]
    asyncio.run(middleware(scope, None, None))  # type: ignore[arg-type]
    assert seen == [client]
