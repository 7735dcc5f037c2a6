"""/v2: the Open Inference Protocol (REST) with Triton's extensions, for existing clients.

https://github.com/kserve/open-inference-protocol and, for the extensions named in `EXTENSIONS`,
https://github.com/triton-inference-server/server/tree/main/docs/protocol. The bytes are the business of
`service.http.tensors`.
"""

import time
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ValidationError

from service.errors import BadRequest, BundleError, NotReady, RequestError, UnknownModel
from service.http import tensors
from service.http.body import read_body
from service.http.openapi import Direct
from service.http.request_options import RequestOptions, admitted_request, terms_of, validated, watch_disconnect
from service.http.v1 import answer_headers
from service.manifest import Tensor
from service.models.family import Choice
from service.models.model import Model, Sum
from service.pipeline import Classified, Classifier, ModelSelector
from service.scheduling.request import RequestState
from service.scheduling.scheduler import Output

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
"""Above this parsing a body would hold up every other request on the event loop."""

_SMALL_BODY, _SMALL_BODY_SECONDS = 64 * 1024, 30.0
"""Of requests to the repository."""

Body = TypeVar("Body", bound=BaseModel)

_TYPES = {"UINT8": "TYPE_UINT8", "FP32": "TYPE_FP32"}


class IndexRequest(BaseModel):
    """The body of a request for the index; it may be left out."""

    ready: bool = False


class RepositoryRequest(BaseModel):
    """The body of a load or unload; it may be left out."""

    parameters: dict[str, Any] = {}


def router(classifier: Classifier, *, version: str) -> APIRouter:
    """The routes under /v2, answering with `classifier`."""
    routes = APIRouter(prefix="/v2", tags=["v2: Open Inference Protocol"])
    registry = classifier.registry

    @routes.get("")
    async def server() -> dict[str, Any]:
        """What this server is."""
        return {"name": "stridevit", "version": version, "extensions": list(EXTENSIONS)}

    @routes.get("/health/live")
    async def live() -> dict[str, bool]:
        """Whether the process answers."""
        return {"live": True}

    @routes.get("/health/ready")
    async def ready() -> dict[str, bool]:
        """Whether models take traffic."""
        if not classifier.takes_traffic:
            raise NotReady("the service is starting or draining, or has no model: retry")
        return {"ready": True}

    @routes.get("/models/stats")
    async def all_statistics() -> dict[str, Any]:
        """What every model has done so far."""
        return {"model_stats": [_statistics(model) for model in registry.ready]}

    def found(name: str, version: str | None) -> Model:
        return classifier.members(_wish(name, version))[0]

    async def metadata(name: str, version: str | None = None) -> dict[str, Any]:
        """A model's inputs and outputs."""
        model = found(name, version)
        return {
            "name": name,
            "versions": [str(other.version) for other in registry.ready if other.name == model.name],
            "platform": "onnxruntime_onnx",
            "inputs": [_tensor(model.manifest.input)],
            "outputs": [_tensor(output) for output in model.manifest.outputs],
        }

    async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        """Whether a model takes traffic."""
        found(name, version)
        return {"name": name, "ready": True}

    async def config(name: str, version: str | None = None) -> dict[str, Any]:
        """A model's configuration, as Triton would write it."""
        return _config(name, found(name, version), max_images_per_request=classifier.settings.max_images_per_request)

    async def statistics(name: str, version: str | None = None) -> dict[str, Any]:
        """What a model has done so far."""
        found(name, version)
        models = classifier.members(_wish(name, version))
        return {"model_stats": [_statistics(model) for model in models]}

    async def infer(request: Request) -> Response:
        """Answer a batch: the input `image` as UINT8 `[n,H,W,3]` pixels, or as BYTES `[n]` or `[n,1]` encoded images.

        Tensors come as JSON or, with `Inference-Header-Content-Length`, as binary data behind it; a length of 0 means
        raw pixels alone. Outputs `logits` and `probabilities` are FP32, or BYTES `value:index:label` with the parameter
        `classification`. The parameters `timeout` (µs) and `priority` (2 and more: batch) count too.
        """
        return await _infer(classifier, request)

    for suffix, handler in (("", metadata), ("/ready", model_ready), ("/config", config), ("/stats", statistics)):
        routes.add_api_route(f"/models/{{name}}{suffix}", handler)
        routes.add_api_route(
            f"/models/{{name}}/versions/{{version}}{suffix}", handler, operation_id=f"{handler.__name__}_of_version"
        )
    routes.add_api_route("/models/{name}/infer", infer, methods=["POST"], route_class_override=Direct)
    routes.add_api_route(
        "/models/{name}/versions/{version}/infer",
        infer,
        methods=["POST"],
        route_class_override=Direct,
        operation_id="infer_of_version",
    )

    @routes.post("/repository/index")
    async def index(request: Request) -> list[dict[str, str]]:
        """Every version that is or could be served, and what became of it; `{"ready": true}` asks for those ready."""
        asked = await _optional(request, IndexRequest)
        return [
            {
                "name": entry.name,
                "version": "" if entry.version is None else str(entry.version),
                "state": entry.state.upper(),
                "reason": entry.reason,
            }
            for entry in registry.index
            if entry.state == "ready" or not asked.ready
        ]

    @routes.post("/repository/models/{name}/load")
    async def load(name: str, request: Request) -> dict[str, str]:
        """Load a model's newest version anew; what served before goes on if it cannot. Needs the admin key."""
        if (await _optional(request, RepositoryRequest)).parameters:
            raise BadRequest("a bundle is loaded as it was published: no configuration or files come with the request")
        try:
            await registry.load(name)
        except BundleError as error:
            raise BadRequest(str(error)) from error
        return {}

    @routes.post("/repository/models/{name}/unload")
    async def unload(name: str, request: Request) -> dict[str, str]:
        """Take a model out of service, once it has answered what it accepted. Needs the admin key."""
        await _optional(request, RepositoryRequest)
        await registry.unload(name)
        return {}

    return routes


async def _optional(request: Request, kind: type[Body]) -> Body:
    """A small JSON body that may be left out; clients send it with any Content-Type or none. Raises BadRequest."""
    body = await read_body(request, max_bytes=_SMALL_BODY, seconds=_SMALL_BODY_SECONDS, hold=lambda _: None)
    try:
        return kind.model_validate_json(body) if body.strip() else kind()
    except ValidationError as error:
        raise BadRequest(f"malformed body: {error.errors()[0]['msg']}") from error


async def _infer(classifier: Classifier, request: Request) -> Response:
    started = time.perf_counter()
    settings = classifier.settings
    wish = _wish(request.path_params["name"], request.path_params.get("version"))
    terms = terms_of(request, validated(RequestOptions, dict(request.query_params)))
    with admitted_request(classifier, request, wish, terms, encoded=False) as ticket:
        body = await read_body(
            request,
            max_bytes=settings.max_body_bytes,
            seconds=settings.body_timeout_seconds,
            hold=lambda count: classifier.admission.hold_bytes(ticket, count),
            deadline=ticket.deadline,
        )
        asked = await _understood(classifier, request, wish, ticket, body)
        # Unpacked it may be a thousand times as large, and from here on it is what is held.
        classifier.admission.hold_bytes(ticket, max(0, _held_bytes(asked) - len(body)))
        del body
        body_timeout_seconds = time.perf_counter() - started
        if asked.timeout_us:
            ticket.amend(seconds=asked.timeout_us / 1e6)
        if asked.priority > 1:
            ticket.amend(priority="batch")
        encoded = asked.encoded is not None
        count = len(asked.encoded) if asked.encoded is not None else len(_pixels(asked))
        model, choice = classifier.choose(wish, ticket, images=count, encoded=encoded)
        if asked.pixels is not None and asked.pixels.shape[1:] != model.manifest.input.shape[1:]:
            raise NotReady("the model was exchanged for one of another image size meanwhile: retry")
        classifier.admission.accept(ticket, model.queue, count, encoded=encoded)
        with model, watch_disconnect(request, ticket):
            try:
                outputs, decode_ms = await _outputs(classifier, model, ticket, asked)
            except RequestError:
                model.statistics.failed(time.perf_counter() - started)
                raise
        answered_at = time.perf_counter()
        response = _response(request, asked, model, choice, outputs)
        timings = classifier.finished(
            model,
            started=started,
            read_ms=body_timeout_seconds * 1000,
            decode_ms=decode_ms,
            outputs=outputs,
            answered_at=answered_at,
        )
        request.scope["state"].update(model=model.name, timings_ms=timings)
        response.headers.update(answer_headers(model, choice, timings))
        return response


async def _understood(
    classifier: Classifier, request: Request, wish: ModelSelector, ticket: RequestState, body: bytes
) -> tensors.Asked:
    settings, headers = classifier.settings, request.headers
    # All members of a family take the same pixels.
    _, height, width, channels = classifier.members(wish)[0].manifest.input.shape
    length = headers.get("inference-header-content-length")
    if length is not None and not (length.isascii() and length.isdecimal() and len(length) < 12):
        raise BadRequest("Inference-Header-Content-Length must be the number of bytes of the JSON part")

    def understand() -> tensors.Asked:
        plain = tensors.decompress(body, headers.get("content-encoding", ""), max_bytes=settings.max_body_bytes)
        return tensors.parse(
            plain,
            header_length=None if length is None else int(length),
            image_shape=(height, width, channels),
            max_images_per_request=settings.max_images_per_request,
        )

    if len(body) > _LARGE_BODY or "content-encoding" in headers:
        return await classifier.run_in_decode_pool(ticket, understand)
    return understand()


async def _outputs(
    classifier: Classifier, model: Model, ticket: RequestState, asked: tensors.Asked
) -> tuple[list[Output], float]:
    """Of every image, and the slowest decoding in ms. Raises the first image's error: there are no partial answers."""
    if asked.encoded is None:
        return await classifier.infer(model, ticket, _pixels(asked)), 0.0
    answers = await classifier.classify(model, ticket, asked.encoded)
    for answer in answers:
        if isinstance(answer, RequestError):
            raise answer
    done = [answer for answer in answers if isinstance(answer, Classified)]
    return [answer.output for answer in done], max(answer.decode_ms for answer in done)


def _held_bytes(asked: tensors.Asked) -> int:
    return sum(map(len, asked.encoded)) if asked.encoded is not None else _pixels(asked).nbytes


def _pixels(asked: tensors.Asked) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    if asked.pixels is None:
        raise BadRequest("the request carries neither pixels nor encoded images")
    return asked.pixels


def _response(
    request: Request, asked: tensors.Asked, model: Model, choice: Choice | None, outputs: list[Output]
) -> Response:
    body, json_length = tensors.answer(
        id=asked.id,
        model_name=model.name,
        model_version=str(model.version),
        outputs=asked.outputs,
        logits=np.stack([output.logits for output in outputs]),
        probabilities=np.stack([output.probabilities for output in outputs]),
        labels=model.bundle.labels,
        parameters={"family": choice.family, "choice": choice.reason} if choice else None,
    )
    headers = {"Vary": "Accept-Encoding"}
    if json_length is not None:
        headers["Inference-Header-Content-Length"] = str(json_length)
    body, encoding = tensors.compress(body, request.headers.get("accept-encoding"))
    if encoding is not None:
        headers["Content-Encoding"] = encoding
    kind = "application/json" if json_length is None else "application/octet-stream"
    return Response(body, media_type=kind, headers=headers)


def _wish(name: str, version: str | None) -> ModelSelector:
    if version is not None and not (version.isascii() and version.isdecimal() and len(version) < 12):
        raise UnknownModel(f"no version {version!r} of model {name!r}: versions are numbers")
    return ModelSelector(model=name, version=None if version is None else int(version))


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def _config(name: str, model: Model, *, max_images_per_request: int) -> dict[str, Any]:
    def described(tensor: Tensor) -> dict[str, Any]:
        return {"name": tensor.name, "data_type": _TYPES[tensor.datatype], "dims": list(tensor.shape[1:])}

    return {
        "name": name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": max_images_per_request,
        "input": [{**described(model.manifest.input), "format": "FORMAT_NONE"}],
        "output": [{**described(output), "label_filename": "labels.txt"} for output in model.manifest.outputs],
        "dynamic_batching": {
            "preferred_batch_size": list(model.queue.cost.sizes),
            "max_queue_delay_microseconds": 0,
        },
        "parameters": {},
    }


def _statistics(model: Model) -> dict[str, Any]:
    done = model.statistics

    def pair(total: Sum) -> dict[str, int]:
        return {"count": total.count, "ns": total.ns}

    nothing = {"count": 0, "ns": 0}
    return {
        "name": model.name,
        "version": str(model.version),
        "last_inference": done.last_inference_ms,
        "inference_count": done.images,
        "execution_count": sum(batch.count for batch in done.batches.values()),
        "inference_stats": {
            "success": pair(done.success),
            "fail": pair(done.fail),
            "queue": pair(done.queue),
            "compute_input": pair(done.decode),
            "compute_infer": pair(done.inference),
            "compute_output": pair(done.answer),
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": {"count": done.batches[size].count, "ns": 0},
                "compute_infer": pair(done.batches[size]),
                "compute_output": {"count": done.batches[size].count, "ns": 0},
            }
            for size in sorted(done.batches)
        ],
        "memory_usage": [],
    }
