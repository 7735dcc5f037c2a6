"""/v1: the API for people."""

from functools import lru_cache, partial
from typing import Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from service import errors
from service.http import exchange, openapi
from service.http.body import read_images
from service.http.fast_path import FastRoute
from service.http.problems import problem
from service.http.v1_schemas import Classification, ClassifyQuery, ModelDetail, ModelList, ModelSummary, summary
from service.pipeline import Answer, Pipeline, ranked


def router(pipeline: Pipeline) -> APIRouter:
    """The routes under /v1."""
    routes = APIRouter(prefix="/v1", tags=["v1"], dependencies=openapi.SECURITY)
    registry = pipeline.registry

    async def classify(request: Request) -> JSONResponse:
        """Classify one or many images.

        A request fails only if every image of it fails. It is rejected at once if it cannot finish before its deadline.
        """
        query: bytes = request.scope["query_string"]
        options = (_parsed_cached if len(query) <= _MAX_CACHED else _parsed)(query)
        results, answer = await pipeline.answer(
            exchange.with_headers(request, options),
            arrived_at=request.scope["state"]["started"],
            read=partial(read_images, request, pipeline.limits),
            write=partial(_results, top_k=options.top_k),
            disconnected=partial(exchange.disconnected, request),
            encoded_bytes=exchange.content_length(request) or 0,
            partial=True,
        )
        return JSONResponse(
            {
                "model": answer.model.name,
                "version": answer.model.version,
                "requested": options.model,
                "results": results,
                "choice": answer.choice,
                "timings_ms": answer.timings_ms,
                "request_id": request.scope["state"]["request_id"],
            },
            headers=exchange.report(request, answer),
        )

    routes.add_api_route(
        "/classify",
        classify,
        methods=["POST"],
        route_class_override=FastRoute,
        response_model=Classification,
        responses=openapi.responses(
            *(errors.BadRequest, errors.BadImage, errors.UnsupportedImage, errors.TooManyPixels),
            *(errors.Unauthorized, errors.UnknownModel, errors.NoSuitableModel, errors.InvalidParameter),
            *(errors.BodyTooLarge, errors.BodyTooSlow, errors.NotReady, errors.Overloaded, errors.DeadlineExceeded),
            example="classification_example",
        ),
        openapi_extra={
            "parameters": openapi.query_parameters(ClassifyQuery, headers=openapi.CLASSIFY_HEADERS),
            "requestBody": openapi.fixed_part("classify_request_body"),
        },
    )

    @routes.get(
        "/models",
        response_model=ModelList,
        response_model_exclude_none=True,
        responses=openapi.responses(errors.Unauthorized, example="models_example"),
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
        responses=openapi.responses(
            *(errors.Unauthorized, errors.UnknownModel, errors.InvalidParameter, errors.NotReady),
            example="model_example",
        ),
    )
    async def model(name: str, version: int | None = None) -> ModelDetail:
        """One model: its manifest, its labels, and what its batches cost."""
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
    return exchange.validated(ClassifyQuery, dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True)))


_MAX_CACHED = 256
_parsed_cached = lru_cache(maxsize=1000)(_parsed)
"""Most clients send the same short query again and again."""


def _results(answer: Answer, *, top_k: int) -> list[dict[str, Any]]:
    labels = answer.model.bundle.labels
    return [
        {"error": problem(image)}
        if isinstance(image, errors.RequestError)
        else {
            "predictions": [
                {"index": index, "label": labels[index], "probability": probability}
                for index, probability in ranked(image.probabilities, top_k)
            ]
        }
        for image in answer.images
    ]
