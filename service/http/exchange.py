"""What /v1, /v2 and /hf share: the options of a request, its client, and the headers of its answer."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import Request
from pydantic import BaseModel, ValidationError

from service.errors import InvalidParameter
from service.http import hints
from service.http.client import Client
from service.pipeline import Answer, RequestOptions

M = TypeVar("M", bound=BaseModel)

_MAX_DIGITS = 19
DEADLINE_HEADER, PRIORITY_HEADER = "X-Deadline-Ms", "X-Priority"


def validated(kind: type[M], values: dict[str, Any]) -> M:
    """`values` as a `kind`. Raises InvalidParameter that names the parameter."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        text = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise InvalidParameter(text) from error


def joined(query: M, sent: dict[str, Any]) -> M:
    """What the query and the body ask for together. Raises InvalidParameter where they contradict each other."""
    kind = type(query)
    body = validated(kind, sent)
    for name in query.model_fields_set & body.model_fields_set:
        one, other = getattr(query, name), getattr(body, name)
        if one != other:
            raise InvalidParameter(f"{name} is {one!r} in the query and {other!r} in the body: give it once")
    return validated(kind, {**query.model_dump(exclude_unset=True), **sent})


def content_length(request: Request) -> int | None:
    """The number of bytes that a body is declared to have."""
    declared: str = request.headers.get("content-length", "")
    return int(declared) if declared.isdecimal() and len(declared) < _MAX_DIGITS else None


def query_values(query: bytes, known: Sequence[str]) -> dict[str, str]:
    """The values of a query string. Raises InvalidParameter for an unknown name, or one that is given twice."""
    values: dict[str, str] = {}
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name not in known:
            raise InvalidParameter(hints.unknown_name("query parameter", name, known))
        if values.setdefault(name, value) != value:
            raise InvalidParameter(f"{name} is given twice in the query, with different values")
    return values


def known_query(*known: str) -> Callable[[Request], Coroutine[Any, Any, None]]:
    """A dependency of routes that take only `known` names in the query."""

    async def check(request: Request) -> None:
        query_values(request.scope["query_string"], known)

    return check


def watching(request: Request, on_leaving: Callable[[], None]) -> AbstractContextManager[None]:
    """A context in which `on_leaving` is called once the client has left. Use it only after the body is read."""
    client = request.scope["state"].get("client")
    return client.watched(on_leaving) if isinstance(client, Client) else _watching_by_task(request, on_leaving)


@contextmanager
def _watching_by_task(request: Request, on_leaving: Callable[[], None]) -> Iterator[None]:
    """The same under a server other than ours."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        on_leaving()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


def report(request: Request, answer: Answer) -> dict[str, str]:
    """Headers that say which model answered, why, and where the time went; the log and the trace say so too."""
    request.scope["state"].update(model=answer.model.name, timings_ms=answer.timings_ms)
    headers = {
        "X-StrideViT-Model": f"{answer.model.name}/{answer.model.version}",
        "Server-Timing": ", ".join(f"{stage};dur={ms:g}" for stage, ms in answer.timings_ms.items()),
    }
    if answer.choice:
        headers["X-StrideViT-Choice"] = answer.choice["reason"]
    return headers


def with_headers(request: Request, options: RequestOptions) -> RequestOptions:
    """`options` of the query, combined with the headers: the query's priority and the earlier deadline take precedence.

    Raises InvalidParameter.
    """
    priority, deadline = request.headers.get(PRIORITY_HEADER), request.headers.get(DEADLINE_HEADER)
    if priority is None and deadline is None:
        return options
    values = options.model_dump(exclude_unset=True)
    if priority is not None:
        values.setdefault("priority", priority)
    if deadline is not None:
        other = validated(RequestOptions, {"deadline_ms": deadline}).deadline_ms
        values["deadline_ms"] = min(filter(None, (other, options.deadline_ms)))
    return validated(RequestOptions, values)
