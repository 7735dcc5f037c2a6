"""POST /v1/compare: one image, many models, each answered by a line as soon as it is done."""

import base64
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from service import errors
from service.comparison import Answered, Event, Failed, Picture, compare, models_to_compare
from service.http import exchange, openapi
from service.http.fast_path import FastRoute
from service.http.problems import error_response, problem
from service.http.v1_body import explained, least_image_bytes, read_sent
from service.http.v1_schemas import predictions
from service.pipeline import Pipeline, RequestOptions
from service.scheduling.admission import Place
from service.scheduling.request import Priority

Predictions = list[dict[str, Any]]


class CompareQuery(BaseModel, frozen=True, use_attribute_docstrings=True):
    """The query of a comparison. The descriptions are shown in /docs."""

    models: Annotated[str | None, Field(min_length=1, max_length=2000)] = None
    """Comma-separated names of models, or of families, which stand for all their ready members: at most 16 models.
    Without names, all models that are ready, or the 16 most accurate of them."""
    top_k: Annotated[int, Field(ge=1, le=1000)] = 5
    """How many classes to return for each model, best first."""
    deadline_ms: Annotated[float | None, Field(gt=0, le=1e9)] = None
    """Each model answers within this many milliseconds of the request's arrival, or not at all."""
    priority: Priority = "interactive"
    """While `interactive` work waits, `batch` work gets only `batch_share` of the turns."""

    @property
    def names(self) -> list[str]:
        """Those of `models`."""
        return [] if self.models is None else [name.strip() for name in self.models.split(",")]


_OPTIONS = tuple(CompareQuery.model_fields)
_JSON_FORM = 'write {"image": "<base64>"}; options such as top_k go in the query'


def router(pipeline: Pipeline) -> APIRouter:
    """The route."""
    routes = APIRouter(prefix="/v1", tags=["v1"], dependencies=openapi.SECURITY)

    async def compare_models(request: Request) -> Response:
        """Classify one image with many models: it is decoded once, and each answer is a line of JSON, sent when ready.

        Each line has an `event`: first `picture`, the image as some models see it; then `answer` or `error` for each
        model; finally `end`. If one model fails, the others still answer. If the whole request or all models fail, the
        response has the status of the error, as on other routes.
        """
        query = exchange.validated(CompareQuery, exchange.query_values(request.scope["query_string"], _OPTIONS))
        # Before anything of the image is read.
        models = models_to_compare(pipeline.registry, query.names)
        image = b""

        async def read(place: Place) -> bytes:
            nonlocal image
            sent = await read_sent(request, place, pipeline.limits, pipeline.decoders, (), json_form=_JSON_FORM)
            if len(sent.images) != 1:
                raise errors.BadRequest(
                    f"a comparison takes one image, and the body holds {len(sent.images)}: send one at a time, or "
                    "many to /v1/classify"
                )
            image = sent.images[0]
            return image

        events = compare(
            pipeline,
            models,
            exchange.with_headers(request, RequestOptions(deadline_ms=query.deadline_ms, priority=query.priority)),
            arrived_at=request.scope["state"]["started"],
            read=read,
            write=lambda answer: predictions(answer.outputs[0], answer.model.bundle.labels, top_k=query.top_k),
            watching=partial(exchange.watching, request),
            encoded_bytes=least_image_bytes(request),
        )
        return _Stream(request, events, lambda error: explained(error, image) if image else error)

    routes.add_api_route(
        "/compare",
        compare_models,
        methods=["POST"],
        name="compare",
        route_class_override=FastRoute,
        status_code=200,
        response_class=_Stream,
        responses=openapi.responses(
            *(errors.BadRequest, errors.BadImage, errors.UnsupportedImage, errors.TooManyPixels),
            *(errors.Unauthorized, errors.Forbidden, errors.KeyLimited, errors.ModelFault),
            *(errors.UnknownModel, errors.InvalidParameter),
            *(errors.BodyTooLarge, errors.BodyTooSlow, errors.NotReady, errors.Overloaded, errors.DeadlineExceeded),
            success=openapi.fixed_part("compare_response"),
        ),
        openapi_extra={
            "parameters": openapi.query_parameters(CompareQuery, headers=openapi.HEADERS),
            "requestBody": openapi.fixed_part("compare_request_body"),
        },
    )
    return routes


class _Stream(Response):
    """The events as lines, each sent as it comes; or one problem in place of them all."""

    media_type = "application/x-ndjson"

    def __init__(
        self,
        request: Request,
        events: AsyncGenerator[Event[Predictions], None],
        explained: Callable[[errors.RequestError], errors.RequestError],
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._request, self._events, self._explained = request, events, explained

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                event = await anext(events)
            except errors.RequestError as error:
                await error_response(self._request, self._explained(error))(scope, receive, send)
                return
            # A proxy that buffered the whole answer would defeat the purpose.
            head = [*self.raw_headers, (b"x-accel-buffering", b"no")]
            await send({"type": "http.response.start", "status": self.status_code, "headers": head})
            await self._line(send, event)
            async for event in events:
                await self._line(send, event)
        await send({"type": "http.response.body", "body": b""})

    async def _line(self, send: Send, event: Event[Predictions]) -> None:
        body = to_json(self._members(event)) + b"\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})

    def _members(self, event: Event[Predictions]) -> dict[str, Any]:
        match event:
            case Picture():
                png = base64.b64encode(event.png).decode()
                size = {"width": event.width, "height": event.height}
                return {"event": "picture", "models": event.models, **size, "png": png}
            case Answered(answer=answer):
                return {
                    "event": "answer",
                    "model": answer.model.name,
                    "version": answer.model.version,
                    "predictions": event.written,
                    "timings_ms": answer.timings_ms,
                }
            case Failed():
                return {"event": "error", "model": event.model, "problem": problem(self._explained(event.error))}
        request_id = self._request.scope["state"]["request_id"]
        return {"event": "end", "request_id": request_id, "agreement": event.agreement}
