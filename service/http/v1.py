"""/v1: the API for people."""

import time
from functools import lru_cache
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from service.errors import RequestError
from service.http.body import read_images
from service.http.openapi import Direct, query_parameters, responses
from service.http.problems import Problem, problem
from service.http.request_options import (
    DEADLINE_HEADER,
    PRIORITY_HEADER,
    RequestOptions,
    admitted_request,
    terms_of,
    validated,
    watch_disconnect,
)
from service.manifest import AccuracySummary, Manifest
from service.models.family import Choice
from service.models.model import Model
from service.models.registry import State
from service.pipeline import Classified, Classifier, ModelSelector


class Question(BaseModel, frozen=True):
    """The query of a classification, beside its terms."""

    model: Annotated[
        str | None,
        Field(
            max_length=100,
            description="Name of a model, or of a family: then the most accurate model that can meet the deadline "
            "answers. Without it the default model does.",
        ),
    ] = None
    version: Annotated[int | None, Field(ge=1, description="Of the model; the newest unless named.")] = None
    top_k: Annotated[int, Field(ge=1, le=1000, description="How many classes, best first.")] = 5
    min_top1: Annotated[
        float, Field(ge=0, le=1, description="A family may not choose a model below this top-1 accuracy.")
    ] = 0.0


class Prediction(BaseModel):
    """One class of the answer."""

    index: int
    label: str
    probability: float


class Result(BaseModel):
    """The answer to one image: predictions, best first, or an error."""

    predictions: list[Prediction] | None = None
    error: Problem | None = None


class Timings(BaseModel):
    """Milliseconds. With several images, `decode`, `queue` and `inference` are those of the slowest."""

    read: float
    decode: float
    queue: float
    inference: float
    total: float


class Skipped(BaseModel):
    """A more accurate model that was not chosen."""

    model: str
    predicted_ms: float


class Chosen(BaseModel):
    """Why a family chose this model."""

    family: str
    reason: str
    """`most_accurate`, `deadline`, or `headroom`: a more accurate one would be in time, but only just."""
    predicted_ms: float
    skipped: list[Skipped]


class Classification(BaseModel):
    """The answer to a request; `results` are in the order of its images."""

    model: str
    version: int
    requested: str | None
    results: list[Result]
    choice: Chosen | None
    """Null where a model was named."""
    timings_ms: Timings
    request_id: str


class ModelSummary(BaseModel):
    """A model of the repository."""

    name: str
    version: int | None
    state: State
    reason: str | None = None
    default: bool = False
    family: str | None = None
    architecture: str | None = None
    variant: str | None = None
    kv_tokens: int | None = None
    tokens: int | None = None
    parameters: int | None = None
    macs: int | None = None
    precision: str | None = None
    image_size: int | None = None
    classes: int | None = None
    accuracy: AccuracySummary | None = None
    """Without the bits of `manifest.accuracy.correct`, which the detail has."""


class ModelList(BaseModel):
    """All models of the repository, and the families among those that serve, most accurate model first."""

    models: list[ModelSummary]
    families: dict[str, list[str]]


class ModelDetail(BaseModel):
    """A model that takes traffic: its manifest, and what the service has learnt about it."""

    name: str
    versions: list[int]
    version: int
    manifest: Manifest
    batch_ms: dict[int, float]
    """Predicted duration of a batch, by its size; no other sizes are run."""
    waiting: int
    labels: tuple[str, ...]


_EXAMPLE = {
    "model": "cifar100-csra-r2",
    "version": 3,
    "requested": "cifar100",
    "results": [{"predictions": [{"index": 42, "label": "leopard", "probability": 0.9123}]}],
    "choice": {
        "family": "cifar100",
        "reason": "deadline",
        "predicted_ms": 12.5,
        "skipped": [{"model": "cifar100-lsra-r4", "predicted_ms": 48.1}],
    },
    "timings_ms": {"read": 0.2, "decode": 1.9, "queue": 4.0, "inference": 2.1, "total": 8.6},
    "request_id": "c8c774003f9448b49c0964e4feeb8708",
}

_SUMMARY = {
    "name": "cifar100-csra-r2",
    "version": 3,
    "state": "ready",
    "default": False,
    "family": "cifar100",
    "architecture": "vit-xs",
    "variant": "csra-r2",
    "kv_tokens": 16,
    "tokens": 64,
    "parameters": 693924,
    "macs": 42100000,
    "precision": "fp32",
    "image_size": 32,
    "classes": 100,
    "accuracy": {"dataset": "cifar100", "split": "test", "n": 10000, "top1": 0.537, "top5": 0.8241},
}
_MODELS_EXAMPLE = {
    "models": [_SUMMARY, {"name": "broken", "version": 1, "state": "unavailable", "reason": "model.onnx: missing"}],
    "families": {"cifar100": ["cifar100-lsra-r4", "cifar100-csra-r2"]},
}
_MODEL_EXAMPLE = {
    "name": "cifar100-csra-r2",
    "versions": [3],
    "version": 3,
    "manifest": {
        "name": "cifar100-csra-r2",
        "attention": {"variant": "csra-r2", "kv_tokens": 16},
        "...": "the rest of manifest.json",
    },
    "batch_ms": {"1": 1.2, "2": 2.1, "4": 4.2},
    "waiting": 0,
    "labels": ["apple", "aquarium_fish", "..."],
}

_BODY = {
    "required": True,
    "description": "The bytes of one image (any Content-Type), or multipart/form-data with one or many files.",
    "content": {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
            }
        },
    },
}

_HEADERS = {
    DEADLINE_HEADER: "The same as `deadline_ms`; where both are given, the earlier one counts.",
    PRIORITY_HEADER: "The same as `priority`.",
    "X-Request-ID": "Echoed in the answer and in the log: 1 to 128 letters, digits, `_`, `.`, `:` and `-`.",
}


def router(classifier: Classifier) -> APIRouter:
    """The routes under /v1, answering with `classifier`."""
    routes = APIRouter(prefix="/v1", tags=["v1"])
    settings = classifier.settings

    async def classify(request: Request) -> JSONResponse:
        """Classify one or many images.

        A request fails only if every image of it fails. It is refused at once if it cannot finish before its deadline.
        """
        started = time.perf_counter()
        query: bytes = request.scope["query_string"]
        question, wish, terms = (_remembered if len(query) <= _MAX_REMEMBERED else _understood)(query)
        with admitted_request(classifier, request, wish, terms_of(request, terms)) as ticket:
            images = await read_images(
                request,
                max_bytes=settings.max_body_bytes,
                max_images_per_request=settings.max_images_per_request,
                seconds=settings.body_timeout_seconds,
                hold=lambda count: classifier.admission.hold_bytes(ticket, count),
                deadline=ticket.deadline,
            )
            read_ms = (time.perf_counter() - started) * 1000
            chosen, choice = classifier.choose(wish, ticket, images=len(images))
            classifier.admission.accept(ticket, chosen.queue, len(images), encoded=True)
            with chosen, watch_disconnect(request, ticket):
                answers = await classifier.classify(chosen, ticket, images)
            answered_at = time.perf_counter()
            done = [answer for answer in answers if isinstance(answer, Classified)]
            if not done:
                chosen.statistics.failed(time.perf_counter() - started)
                raise next(answer for answer in answers if isinstance(answer, RequestError))
            results = [_result(chosen, answer, question.top_k) for answer in answers]
            timings = classifier.finished(
                chosen,
                started=started,
                read_ms=read_ms,
                decode_ms=max(answer.decode_ms for answer in done),
                outputs=[answer.output for answer in done],
                answered_at=answered_at,
            )
            request.scope["state"].update(model=chosen.name, timings_ms=timings)
            return JSONResponse(
                {
                    "model": chosen.name,
                    "version": chosen.version,
                    "requested": question.model,
                    "results": results,
                    "choice": choice.as_dict() if choice else None,
                    "timings_ms": timings,
                    "request_id": request.scope["state"]["request_id"],
                },
                headers=answer_headers(chosen, choice, timings),
            )

    routes.add_api_route(
        "/classify",
        classify,
        methods=["POST"],
        route_class_override=Direct,
        response_model=Classification,
        responses=responses(400, 401, 404, 408, 413, 415, 422, 429, 503, 504, example=_EXAMPLE),
        openapi_extra={
            "parameters": query_parameters(Question, RequestOptions, headers=_HEADERS),
            "requestBody": _BODY,
        },
    )

    @routes.get(
        "/models",
        response_model=ModelList,
        response_model_exclude_none=True,
        responses=responses(401, example=_MODELS_EXAMPLE),
    )
    async def models() -> ModelList:
        """All models of the repository, with what they are and whether they take traffic."""
        registry = classifier.registry
        ready = {(model.name, model.version): model for model in registry.ready}
        return ModelList(
            models=[
                _summary(ready[entry.name, entry.version], default=entry.name == registry.default)
                if entry.version is not None and (entry.name, entry.version) in ready
                else ModelSummary(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
                for entry in registry.index
            ],
            families={name: [model.name for model in ladder] for name, ladder in registry.families.items()},
        )

    @routes.get("/models/{name}", responses=responses(401, 404, 422, 503, example=_MODEL_EXAMPLE))
    async def model(name: str, version: int | None = None) -> ModelDetail:
        """One model: its manifest, its labels, and what its batches cost."""
        found = classifier.registry.find(name, version)
        return ModelDetail(
            name=found.name,
            versions=[other.version for other in classifier.registry.ready if other.name == found.name],
            version=found.version,
            manifest=found.manifest,
            batch_ms={size: round(s * 1000, 3) for size, s in found.queue.cost.as_dict().items()},
            waiting=len(found.queue),
            labels=found.bundle.labels,
        )

    return routes


def _understood(query: bytes) -> tuple[Question, ModelSelector, RequestOptions]:
    """What a query string asks for. Raises InvalidParameter."""
    values = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    question, terms = validated(Question, values), validated(RequestOptions, values)
    return question, ModelSelector(model=question.model, version=question.version, min_top1=question.min_top1), terms


_MAX_REMEMBERED = 256
_remembered = lru_cache(maxsize=1000)(_understood)
"""Most clients send the same short query again and again."""


def answer_headers(model: Model, choice: Choice | None, timings_ms: dict[str, float]) -> dict[str, str]:
    """Which model answered, why, and where the time went."""
    headers = {
        "X-StrideViT-Model": f"{model.name}/{model.version}",
        "Server-Timing": ", ".join(f"{stage};dur={ms:g}" for stage, ms in timings_ms.items()),
    }
    if choice:
        headers["X-StrideViT-Choice"] = choice.reason
    return headers


def _result(model: Model, answer: Classified | RequestError, top_k: int) -> dict[str, Any]:
    if isinstance(answer, RequestError):
        return {"error": problem(answer)}
    labels = model.bundle.labels
    return {
        "predictions": [
            {"index": index, "label": labels[index], "probability": probability}
            for index, probability in answer.ranked(top_k)
        ]
    }


def _summary(model: Model, *, default: bool) -> ModelSummary:
    manifest = model.manifest
    attention = manifest.attention
    return ModelSummary(
        name=manifest.name,
        version=model.bundle.version,
        state="ready",
        default=default,
        family=manifest.family,
        architecture=manifest.architecture,
        variant=attention.variant if attention else None,
        kv_tokens=attention.kv_tokens if attention else None,
        tokens=attention.tokens if attention else None,
        parameters=manifest.params,
        macs=manifest.macs,
        precision=manifest.precision,
        image_size=manifest.preprocessing.crop,
        classes=manifest.num_classes,
        accuracy=manifest.accuracy,
    )
