"""/v2: the Open Inference Protocol (REST) with Triton's extensions, for existing clients.

https://github.com/kserve/open-inference-protocol and, for the extensions named in `EXTENSIONS`,
https://github.com/triton-inference-server/server/tree/main/docs/protocol. `service.http.tensors` reads and writes the
bytes.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, ValidationError

from service.errors import (
    BadImage,
    BadRequest,
    BodyTooLarge,
    BodyTooSlow,
    BundleError,
    DeadlineExceeded,
    Forbidden,
    InvalidParameter,
    KeyLimited,
    ModelFault,
    NotReady,
    Overloaded,
    TooManyPixels,
    Unauthorized,
    UnknownModel,
    UnsupportedImage,
)
from service.http import exchange, hints, tensors, v2_metadata
from service.http.body import read_body, read_small_body
from service.http.compression import compress, decompress
from service.http.fast_path import FastRoute
from service.http.openapi import (
    INFER_HEADERS,
    SECURITY,
    described_by,
    fixed_part,
    query_parameters,
    v2_responses,
)
from service.models.model import Model
from service.pipeline import Answer, Inputs, Pipeline, RequestOptions
from service.scheduling.admission import Place
from service.scheduling.request import Priority

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
)

_LARGE_BODY = 32 * 1024
"""Parsing a larger body on the event loop would delay all other requests."""

_SMALL_BODY, _SMALL_BODY_SECONDS = 64 * 1024, 30.0
"""Limits of a request to the repository."""

_TAG: str | Enum = "v2: Open Inference Protocol"


class InferQuery(BaseModel, frozen=True, use_attribute_docstrings=True):
    """The query of an inference. The protocol has none, so an unknown name is taken for one of these, misspelt."""

    deadline_ms: Annotated[float | None, Field(gt=0, le=1e9)] = None
    """Answer within this many milliseconds of the request's arrival, or not at all."""
    priority: Priority = "interactive"
    """While `interactive` work waits, `batch` work gets only `batch_share` of the turns."""


class RepositoryRequest(BaseModel, strict=True):
    """The optional body of a request to the repository."""

    ready: bool = False
    """Whether the index is to show ready models only."""
    parameters: dict[str, Any] = {}
    """Configuration for a load or unload."""


def probes(pipeline: Pipeline) -> APIRouter:
    """The routes under /v2 that need no key."""
    routes = APIRouter(prefix="/v2/health", tags=[_TAG])

    @routes.get("/live", responses=v2_responses(NotReady))
    async def live() -> dict[str, bool]:
        """Whether the process and its engine work; 503 if only a restart may help."""
        pipeline.require_alive()
        return {"live": True}

    @routes.get("/ready", responses=v2_responses(NotReady))
    async def ready() -> dict[str, bool]:
        """Whether models take traffic."""
        pipeline.require_ready()
        return {"ready": True}

    return routes


def router(pipeline: Pipeline, *, version: str) -> APIRouter:
    """The server and its models."""
    routes = APIRouter(prefix="/v2", tags=[_TAG], dependencies=SECURITY)
    registry = pipeline.registry

    @routes.get("", responses=v2_responses(Unauthorized, KeyLimited))
    async def server() -> dict[str, Any]:
        """The name, version and extensions of this server."""
        return {"name": "stridevit", "version": version, "extensions": list(EXTENSIONS)}

    @routes.get("/models/stats", responses=v2_responses(Unauthorized, KeyLimited))
    async def all_statistics() -> dict[str, Any]:
        """Statistics of every model."""
        return {"model_stats": [v2_metadata.statistics(model) for model in registry.ready]}

    def candidates(request: Request) -> tuple[str, list[Model]]:
        name, version = _addressed(request)
        return name, registry.candidates(name, version)[1]

    async def metadata(request: Request) -> dict[str, Any]:
        """A model's inputs and outputs."""
        name, (model, *_) = candidates(request)
        versions = [other.version for other in registry.ready if other.name == model.name]
        return v2_metadata.metadata(name, model, versions=versions)

    async def model_ready(request: Request) -> dict[str, Any]:
        """Whether a model takes traffic."""
        name, _ = candidates(request)
        pipeline.require_alive()
        return {"name": name, "ready": True}

    async def config(request: Request) -> dict[str, Any]:
        """A model's configuration, as Triton would write it."""
        name, (model, *_) = candidates(request)
        return v2_metadata.config(
            name,
            model,
            max_images_per_request=pipeline.limits.max_images_per_request,
            versions_to_serve=registry.versions_to_serve,
        )

    async def statistics(request: Request) -> dict[str, Any]:
        """Statistics of a model: of each version that serves, or of the one in the path."""
        models = registry.serving(*_addressed(request))
        return {"model_stats": [v2_metadata.statistics(model) for model in models]}

    async def infer(request: Request) -> Response:
        """Classify a batch: the input `image` is UINT8 `[n,H,W,3]` pixels, or BYTES `[n]` or `[n,1]` encoded images.

        Tensors are sent as JSON or, with `Inference-Header-Content-Length`, as binary data after the JSON; a length of
        0 means raw pixels alone. The outputs `logits` and `probabilities` are FP32, or BYTES `value:index:label` with
        the parameter `classification`. The parameters `timeout` (µs) and `priority` (2 or more: batch) apply too.
        """
        name, version = _addressed(request)
        query = exchange.query_values(request.scope["query_string"], tuple(InferQuery.model_fields))
        options = exchange.with_headers(request, exchange.validated(RequestOptions, query))
        parsed: tensors.InferenceRequest
        limits = pipeline.limits

        async def read(place: Place) -> Inputs:
            nonlocal parsed
            body = await read_body(request, limits, place)
            parse = partial(_parse, request, body, pipeline, name, version)
            large = len(body) > _LARGE_BODY or "content-encoding" in request.headers
            parsed = await pipeline.decoders.run(place.state, parse) if large else parse()
            return parsed.inputs

        try:
            response, answer = await pipeline.answer(
                options.model_copy(update={"model": name, "version": version}),
                arrived_at=request.scope["state"]["started"],
                read=read,
                write=lambda answer: _response(request, parsed, answer),
                watching=partial(exchange.watching, request),
                encoded_bytes=None,  # as far as the head tells
            )
        except UnsupportedImage as error:
            images = parsed.inputs.images
            # With several images, it is not known here which one it was.
            if len(images) == 1 and (hint := hints.for_body(bytes(images[0]))):
                raise UnsupportedImage(hint) from error
            raise
        response.headers.update(exchange.report(request, answer))
        return response

    handlers: dict[str, Callable[..., Any]] = {
        "": metadata,
        "/ready": model_ready,
        "/config": config,
        "/stats": statistics,
        "/infer": infer,
    }
    for suffix, handler in handlers.items():
        _add_both(routes, suffix, handler, is_infer=handler is infer)
    return routes


def _add_both(routes: APIRouter, suffix: str, handler: Callable[..., Any], *, is_infer: bool) -> None:
    """Add a handler for a model's newest version, and for one that the path names."""
    more: dict[str, Any] = {}
    options: dict[str, Any] = {"responses": v2_responses(Unauthorized, KeyLimited, UnknownModel, NotReady)}
    if is_infer:
        more = {
            "parameters": query_parameters(InferQuery, headers=INFER_HEADERS),
            "requestBody": fixed_part("infer_request_body"),
        }
        options = {
            "methods": ["POST"],
            "route_class_override": FastRoute,
            "responses": v2_responses(
                *(BadRequest, BadImage, UnsupportedImage, TooManyPixels, InvalidParameter, Unauthorized, Forbidden),
                *(UnknownModel, KeyLimited, ModelFault),
                *(BodyTooLarge, BodyTooSlow, NotReady, Overloaded, DeadlineExceeded),
                success=fixed_part("infer_response"),
            ),
        }
    for start, end in (("/models/{name}", ""), ("/models/{name}/versions/{version}", "_of_version")):
        path, extra = start + suffix, described_by(start, **more)
        routes.add_api_route(path, handler, name=f"{handler.__name__}{end}", openapi_extra=extra, **options)


def repository(pipeline: Pipeline) -> APIRouter:
    """The routes under /v2/repository."""
    routes = APIRouter(prefix="/v2/repository", tags=[_TAG], dependencies=SECURITY)
    registry = pipeline.registry

    changing = v2_responses(BadRequest, Forbidden, KeyLimited, UnknownModel, NotReady, BodyTooLarge, BodyTooSlow)

    @routes.post(
        "/index",
        responses=v2_responses(BadRequest, Unauthorized, KeyLimited, BodyTooLarge, BodyTooSlow),
        openapi_extra={"requestBody": fixed_part("index_request_body")},
    )
    async def index(request: Request) -> list[dict[str, str]]:
        """Every version that is or could be served, and its state; `{"ready": true}` asks for ready ones only."""
        only_ready = (await repository_request(request)).ready
        return [
            {
                "name": entry.name,
                "version": "" if entry.version is None else str(entry.version),
                "state": entry.state.upper(),
                "reason": entry.reason,
            }
            for entry in registry.index
            if entry.state == "ready" or not only_ready
        ]

    @routes.post(
        "/models/{name}/load", responses=changing, openapi_extra={"requestBody": fixed_part("load_request_body")}
    )
    async def load(name: str, request: Request) -> dict[str, str]:
        """Load a model's newest version again; if that fails, what serves keeps serving. Needs the admin key."""
        if (await repository_request(request)).parameters:
            raise BadRequest("a bundle is loaded as it was published: no configuration or files come with the request")
        try:
            await registry.load(name)
        except BundleError as error:
            raise BadRequest(str(error)) from error
        return {}

    @routes.post(
        "/models/{name}/unload", responses=changing, openapi_extra={"requestBody": fixed_part("unload_request_body")}
    )
    async def unload(name: str, request: Request) -> dict[str, str]:
        """Take a model out of service, once it has answered what it accepted. Needs the admin key."""
        await repository_request(request)
        await registry.unload(name)
        return {}

    return routes


async def repository_request(request: Request) -> RepositoryRequest:
    """A JSON body that may be missing; clients send it with any Content-Type or none. Raises BadRequest."""
    body = await read_small_body(request, max_bytes=_SMALL_BODY, timeout_seconds=_SMALL_BODY_SECONDS)
    try:
        return RepositoryRequest.model_validate_json(body) if body.strip() else RepositoryRequest()
    except ValidationError as error:
        raise BadRequest(f"malformed body: {error.errors()[0]['msg']}") from error


def _parse(
    request: Request, body: bytes, pipeline: Pipeline, model: str, version: int | None
) -> tensors.InferenceRequest:
    """The request in a body. Raises BadRequest, or BodyTooLarge if it is too large once decompressed."""
    limits, headers = pipeline.limits, request.headers
    # All members of a family take pixels of the same shape.
    _, height, width, channels = pipeline.registry.candidates(model, version)[1][0].manifest.input.shape
    length = headers.get("inference-header-content-length")
    if length is not None and not _is_number(length):
        raise BadRequest("Inference-Header-Content-Length must be the number of bytes of the JSON part")
    return tensors.parse(
        decompress(body, headers.get("content-encoding", ""), max_bytes=limits.max_body_bytes),
        header_length=None if length is None else int(length),
        image_shape=(height, width, channels),
        max_images=limits.max_images_per_request,
    )


def _response(request: Request, parsed: tensors.InferenceRequest, answer: Answer) -> Response:
    """The response, without the headers about the finished request."""
    model, choice = answer.model, answer.choice
    body, json_length = tensors.answer(
        id=parsed.id,
        model_name=model.name,
        model_version=str(model.version),
        outputs=parsed.outputs,
        logits=np.stack([output.logits for output in answer.outputs]),
        probabilities=np.stack([output.probabilities for output in answer.outputs]),
        labels=model.bundle.labels,
        parameters={"family": choice["family"], "choice": choice["reason"]} if choice else None,
    )
    headers = {"Vary": "Accept-Encoding"}
    if json_length is not None:
        headers["Inference-Header-Content-Length"] = str(json_length)
    body, encoding = compress(body, request.headers.get("accept-encoding"))
    if encoding is not None:
        headers["Content-Encoding"] = encoding
    kind = "application/json" if json_length is None else "application/octet-stream"
    return Response(body, media_type=kind, headers=headers)


def _addressed(request: Request) -> tuple[str, int | None]:
    """The model and the version in a path. Raises UnknownModel."""
    name = request.path_params["name"]
    return name, _number(name, request.path_params.get("version"))


def _number(name: str, version: str | None) -> int | None:
    """The version in a path. Raises UnknownModel."""
    if version is not None and not _is_number(version):
        raise UnknownModel(f"no version {version!r} of model {name!r}: versions are numbers")
    return None if version is None else int(version)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 12
