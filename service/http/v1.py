"""/v1: the API for people."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic_core import to_json

from service import errors
from service.http import exchange, hints, openapi
from service.http.fast_path import FastRoute
from service.http.problems import problem
from service.http.v1_body import explained, least_image_bytes, read_sent
from service.http.v1_schemas import (
    Classification,
    ClassifyQuery,
    ModelDetail,
    ModelList,
    ModelSummary,
    predictions,
    summary,
)
from service.pipeline import Answer, Inputs, Pipeline
from service.scheduling.admission import Place

OPTIONS = tuple(ClassifyQuery.model_fields)
"""What a classification may ask for, in its query, a form's fields or JSON members."""


def router(pipeline: Pipeline) -> APIRouter:
    """The routes under /v1."""
    routes = APIRouter(prefix="/v1", tags=["v1"], dependencies=openapi.SECURITY)
    registry = pipeline.registry

    async def classify(request: Request) -> Response:
        """Classify one or many images.

        A request fails only if all of its images fail. It is rejected at once if it cannot finish before its deadline.
        """
        query: bytes = request.scope["query_string"]
        options = (_parsed_cached if len(query) <= _MAX_CACHED else _parsed)(query)
        images: Sequence[bytes] = ()

        async def read(place: Place) -> Inputs:
            nonlocal images, options
            sent = await read_sent(request, place, pipeline.limits, pipeline.decoders, OPTIONS)
            images = sent.images
            if not sent.options:
                return Inputs(images=images)
            options = exchange.joined(options, sent.options)
            return Inputs(images=images, options=exchange.with_headers(request, options))

        try:
            results, answer = await pipeline.answer(
                exchange.with_headers(request, options),
                arrived_at=request.scope["state"]["started"],
                read=read,
                write=lambda answer: _results(answer, images, top_k=options.top_k),
                watching=partial(exchange.watching, request),
                encoded_bytes=least_image_bytes(request),
                partial=True,
            )
        except errors.UnsupportedImage as error:
            # Every image failed, and this is the error of the first; without images, it is about the JSON around them.
            if hint := images and hints.for_body(images[0]):
                raise errors.UnsupportedImage(hint) from error
            raise
        members = {
            "model": answer.model.name,
            "version": answer.model.version,
            "requested": options.model,
            "results": results,
            "choice": answer.choice,
            "timings_ms": answer.timings_ms,
            "request_id": request.scope["state"]["request_id"],
        }
        # Outputs are finite: `to_json` would write NaN as it is.
        return Response(to_json(members), media_type="application/json", headers=exchange.report(request, answer))

    routes.add_api_route(
        "/classify",
        classify,
        methods=["POST"],
        route_class_override=FastRoute,
        response_model=Classification,
        responses=openapi.responses(
            *(errors.BadRequest, errors.BadImage, errors.UnsupportedImage, errors.TooManyPixels),
            *(errors.Unauthorized, errors.Forbidden, errors.KeyLimited, errors.ModelFault),
            *(errors.UnknownModel, errors.NoSuitableModel, errors.InvalidParameter),
            *(errors.BodyTooLarge, errors.BodyTooSlow, errors.NotReady, errors.Overloaded, errors.DeadlineExceeded),
            example="classification_example",
        ),
        openapi_extra={
            "parameters": openapi.query_parameters(ClassifyQuery, headers=openapi.HEADERS),
            "requestBody": openapi.fixed_part("classify_request_body"),
        },
    )

    @routes.get(
        "/models",
        dependencies=[Depends(exchange.known_query())],
        response_model=ModelList,
        response_model_exclude_none=True,
        responses=openapi.responses(
            errors.Unauthorized, errors.KeyLimited, errors.InvalidParameter, example="models_example"
        ),
    )
    async def models() -> ModelList:
        """All models of the repository, with what they are and whether they take traffic."""
        ready = {(model.name, model.version): model for model in registry.ready}
        return ModelList(
            models=[
                summary(ready[entry.name, entry.version], default=entry.name == registry.default)
                if entry.version is not None and (entry.name, entry.version) in ready
                else ModelSummary(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
                for entry in registry.index
            ],
            families={name: [model.name for model in members] for name, members in registry.families.items()},
        )

    @routes.get(
        "/models/{name}",
        dependencies=[Depends(exchange.known_query("version"))],
        responses=openapi.responses(
            *(errors.Unauthorized, errors.UnknownModel, errors.InvalidParameter, errors.NotReady),
            example="model_example",
        ),
    )
    async def model(name: str, version: int | None = None) -> ModelDetail:
        """One model: its manifest, its labels, and how long its batches take."""
        found = registry.find(name, version)
        return ModelDetail(
            name=found.name,
            versions=[other.version for other in registry.ready if other.name == found.name],
            version=found.version,
            manifest=found.manifest,
            batch_ms={size: round(seconds * 1000, 3) for size, seconds in found.queue.cost.as_dict().items()},
            waiting=len(found.queue),
            labels=found.bundle.labels,
        )

    return routes


def _parsed(query: bytes) -> ClassifyQuery:
    """What a query string asks for. Raises errors.InvalidParameter."""
    return exchange.validated(ClassifyQuery, exchange.query_values(query, OPTIONS))


_MAX_CACHED = 256
_parsed_cached = lru_cache(maxsize=1000)(_parsed)
"""Most clients send the same short query again and again."""


def _results(answer: Answer, images: Sequence[bytes], *, top_k: int) -> list[dict[str, Any]]:
    labels = answer.model.bundle.labels
    return [
        {"error": problem(explained(image, images[number]))}
        if isinstance(image, errors.RequestError)
        else {"predictions": predictions(image, labels, top_k=top_k)}
        for number, image in enumerate(answer.images)
    ]
