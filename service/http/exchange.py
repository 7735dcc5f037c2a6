"""What /v1 and /v2 share: the options of a request, its client, and the headers of its answer."""

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from service.errors import InvalidParameter
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


def content_length(request: Request) -> int | None:
    """The number of bytes that a body is declared to have."""
    declared: str = request.headers.get("content-length", "")
    return int(declared) if declared.isdecimal() and len(declared) < _MAX_DIGITS else None


async def disconnected(request: Request) -> None:
    """Return once the client has left. Only after the body is read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
    """`options` of the query, and what the headers say: the query's priority and the earlier deadline count.

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
