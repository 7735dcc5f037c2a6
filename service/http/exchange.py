"""What /v1 and /v2 share: the options of a request, the call of the pipeline, and the headers of its answer."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from service.errors import InvalidParameter
from service.pipeline import Answer, Inputs, Pipeline, RequestOptions
from service.scheduling.admission import Place

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

DEADLINE_HEADER, PRIORITY_HEADER = "X-Deadline-Ms", "X-Priority"


def validated(kind: type[M], values: dict[str, Any]) -> M:
    """`values` as a `kind`. Raises InvalidParameter that names the parameter."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        text = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise InvalidParameter(text) from error


async def answer(
    pipeline: Pipeline,
    request: Request,
    options: RequestOptions,
    *,
    read: Callable[[Place], Awaitable[Inputs]],
    write: Callable[[Answer], T],
    encoded: bool = True,
    partial: bool = False,
) -> tuple[T, Answer]:
    """Call the pipeline for an HTTP request, whose headers may add to the `options`. Raises RequestError."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    state = request.scope["state"]
    written, given = await pipeline.answer(
        _with_headers(request, options),
        arrived_at=state["started"],
        read=read,
        write=write,
        disconnected=disconnected,
        encoded=encoded,
        partial=partial,
    )
    state.update(model=given.model.name, timings_ms=given.timings_ms)
    return written, given


def answer_headers(given: Answer) -> dict[str, str]:
    """Which model answered, why, and where the time went."""
    headers = {
        "X-StrideViT-Model": f"{given.model.name}/{given.model.version}",
        "Server-Timing": ", ".join(f"{stage};dur={ms:g}" for stage, ms in given.timings_ms.items()),
    }
    if given.choice:
        headers["X-StrideViT-Choice"] = given.choice.reason
    return headers


def _with_headers(request: Request, options: RequestOptions) -> RequestOptions:
    """The query's priority comes before the header's, and the earlier deadline counts. Raises InvalidParameter."""
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
