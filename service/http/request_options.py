"""From an HTTP request to an accepted one: its deadline and priority, its place, and its caller's watch_disconnect."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, Field, ValidationError

from service.errors import ClientDisconnected, DeadlineExceeded, InvalidParameter, Overloaded
from service.pipeline import Classifier, ModelSelector
from service.scheduling.request import Priority, RequestState

Q = TypeVar("Q", bound=BaseModel)

DEADLINE_HEADER, PRIORITY_HEADER = "X-Deadline-Ms", "X-Priority"


class RequestOptions(BaseModel, frozen=True):
    """How a request wants to be treated: from the query, and from headers of the same meaning."""

    deadline_ms: Annotated[
        float | None,
        Field(gt=0, le=1e9, description="Answer within so many milliseconds of the request's arrival, or not at all."),
    ] = None
    priority: Annotated[Priority, Field(description="`batch` work waits until no `interactive` work is left.")] = (
        "interactive"
    )


def terms_of(request: Request, terms: RequestOptions) -> RequestOptions:
    """`terms` of the query, with what the headers say; the earlier deadline counts. Raises InvalidParameter."""
    priority, deadline = request.headers.get(PRIORITY_HEADER), request.headers.get(DEADLINE_HEADER)
    if priority is None and deadline is None:
        return terms
    given = terms.model_dump(exclude_unset=True)
    if priority is not None:
        given.setdefault("priority", priority)
    if deadline is not None:
        other = validated(RequestOptions, {"deadline_ms": deadline}).deadline_ms
        given["deadline_ms"] = min(filter(None, (other, terms.deadline_ms)))
    return validated(RequestOptions, given)


def validated(kind: type[Q], values: dict[str, Any]) -> Q:
    """`values` as a `kind`. Raises InvalidParameter that names the parameter."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        text = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise InvalidParameter(text) from error


@contextmanager
def admitted_request(
    classifier: Classifier, request: Request, wish: ModelSelector, terms: RequestOptions, *, encoded: bool = True
) -> Iterator[RequestState]:
    """A request, until the block ends. Raises Overloaded before a byte of the body is read.

    `encoded`: whether it is known to need a decoder.
    """
    rejections = classifier.metrics.rejections
    ticket = classifier.ticket(
        deadline_ms=terms.deadline_ms, priority=terms.priority, since=request.scope["state"]["started"]
    )
    try:
        classifier.reject_if_unreachable(wish, ticket, encoded=encoded)
        with classifier.admission.place(ticket):
            yield ticket
    except Overloaded as error:
        rejections.labels(error.reason).inc()
        raise
    except DeadlineExceeded:
        rejections.labels("expired").inc()
        raise
    except ClientDisconnected:
        rejections.labels("hung_up").inc()
        raise


@contextmanager
def watch_disconnect(request: Request, ticket: RequestState) -> Iterator[None]:
    """Once the body is read: mark the ticket as gone as soon as the client hangs up."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        ticket.gone = True

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
