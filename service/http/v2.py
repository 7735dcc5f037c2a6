"""/v2: the Open Inference Protocol (REST) with Triton's extensions, for existing clients.

https://github.com/kserve/open-inference-protocol and, for the extensions named in `EXTENSIONS`,
https://github.com/triton-inference-server/server/tree/main/docs/protocol. `service.http.tensors` reads and writes the
bytes.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ValidationError

from service.errors import BadRequest, BundleError, UnknownModel
from service.http import exchange, tensors, v2_metadata
from service.http.body import read_body, read_small_body
from service.http.compression import compress, decompress
from service.http.fast_path import FastRoute
from service.http.openapi import SECURITY
from service.models.model import Model
from service.pipeline import Answer, Inputs, Pipeline, RequestOptions
from service.scheduling.admission import Place

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


class RepositoryRequest(BaseModel):
    """The optional body of a request to the repository."""

    ready: bool = False
    """Whether the index is to show ready models only."""
    parameters: dict[str, Any] = {}
    """Configuration for a load or unload."""


def probes(pipeline: Pipeline) -> APIRouter:
    """The routes under /v2 that need no key."""
    routes = APIRouter(prefix="/v2/health", tags=[_TAG])

    @routes.get("/live")
    async def live() -> dict[str, bool]:
        """Whether the process answers."""
        return {"live": True}

    @routes.get("/ready")
    async def ready() -> dict[str, bool]:
        """Whether models take traffic."""
        pipeline.require_ready()
        return {"ready": True}

    return routes


def router(pipeline: Pipeline, *, version: str) -> APIRouter:
    """The server and its models."""
    routes = APIRouter(prefix="/v2", tags=[_TAG], dependencies=SECURITY)
    registry = pipeline.registry

    @routes.get("")
    async def server() -> dict[str, Any]:
        """What this server is."""
        return {"name": "stridevit", "version": version, "extensions": list(EXTENSIONS)}

    @routes.get("/models/stats")
    async def all_statistics() -> dict[str, Any]:
        """What every model has done so far."""
        return {"model_stats": [v2_metadata.statistics(model) for model in registry.ready]}

    def found(name: str, version: str | None) -> Model:
        return registry.candidates(name, _number(name, version))[1][0]

    async def metadata(name: str, version: str | None = None) -> dict[str, Any]:
        """A model's inputs and outputs."""
        model = found(name, version)
        versions = [other.version for other in registry.ready if other.name == model.name]
        return v2_metadata.metadata(name, model, versions=versions)

    async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        """Whether a model takes traffic."""
        found(name, version)
        return {"name": name, "ready": True}

    async def config(name: str, version: str | None = None) -> dict[str, Any]:
        """A model's configuration, as Triton would write it."""
        limit = pipeline.limits.max_images_per_request
        return v2_metadata.config(name, found(name, version), max_images_per_request=limit)

    async def statistics(name: str, version: str | None = None) -> dict[str, Any]:
        """What a model has done so far."""
        _, models = registry.candidates(name, _number(name, version))
        return {"model_stats": [v2_metadata.statistics(model) for model in models]}

    async def infer(request: Request) -> Response:
        """Answer a batch: the input `image` as UINT8 `[n,H,W,3]` pixels, or as BYTES `[n]` or `[n,1]` encoded images.

        Tensors come as JSON or, with `Inference-Header-Content-Length`, as binary data behind it; a length of 0 means
        raw pixels alone. Outputs `logits` and `probabilities` are FP32, or BYTES `value:index:label` with the parameter
        `classification`. The parameters `timeout` (µs) and `priority` (2 and more: batch) count too.
        """
        name = request.path_params["name"]
        version = _number(name, request.path_params.get("version"))
        query = {key: value for key, value in request.query_params.items() if key in ("deadline_ms", "priority")}
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

        response, answer = await pipeline.answer(
            options.model_copy(update={"model": name, "version": version}),
            arrived_at=request.scope["state"]["started"],
            read=read,
            write=lambda answer: _response(request, parsed, answer),
            disconnected=partial(exchange.disconnected, request),
            encoded_bytes=None,  # as far as the head tells
        )
        response.headers.update(exchange.report(request, answer))
        return response

    handlers: dict[str, Callable[..., Any]] = {
        "": metadata,
        "/ready": model_ready,
        "/config": config,
        "/stats": statistics,
        "/infer": infer,
    }
    fast: dict[str, Any] = {"methods": ["POST"], "route_class_override": FastRoute}
    for suffix, handler in handlers.items():
        options = fast if handler is infer else {}
        routes.add_api_route(f"/models/{{name}}{suffix}", handler, **options)
        path, operation = f"/models/{{name}}/versions/{{version}}{suffix}", f"{handler.__name__}_of_version"
        routes.add_api_route(path, handler, operation_id=operation, **options)
    return routes


def repository(pipeline: Pipeline) -> APIRouter:
    """The routes under /v2/repository."""
    routes = APIRouter(prefix="/v2/repository", tags=[_TAG], dependencies=SECURITY)
    registry = pipeline.registry

    @routes.post("/index")
    async def index(request: Request) -> list[dict[str, str]]:
        """Every version that is or could be served, and its state; `{"ready": true}` asks for those ready."""
        only_ready = (await _repository_request(request)).ready
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

    @routes.post("/models/{name}/load")
    async def load(name: str, request: Request) -> dict[str, str]:
        """Load a model's newest version again; what serves goes on if that fails. Needs the admin key."""
        if (await _repository_request(request)).parameters:
            raise BadRequest("a bundle is loaded as it was published: no configuration or files come with the request")
        try:
            await registry.load(name)
        except BundleError as error:
            raise BadRequest(str(error)) from error
        return {}

    @routes.post("/models/{name}/unload")
    async def unload(name: str, request: Request) -> dict[str, str]:
        """Take a model out of service, once it has answered what it accepted. Needs the admin key."""
        await _repository_request(request)
        await registry.unload(name)
        return {}

    return routes


async def _repository_request(request: Request) -> RepositoryRequest:
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


def _number(name: str, version: str | None) -> int | None:
    """The version in a path. Raises UnknownModel."""
    if version is not None and not _is_number(version):
        raise UnknownModel(f"no version {version!r} of model {name!r}: versions are numbers")
    return None if version is None else int(version)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 12
