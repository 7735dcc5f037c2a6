"""/v1: the API for people."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from service.bodies import read_images
from service.bundle import Accuracy
from service.classify import Classified, Classifier
from service.errors import RequestError
from service.problems import problem
from service.registry import Model


class Prediction(BaseModel):
    """One class of the answer."""

    index: int
    label: str
    probability: float


class Problem(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str | None = None


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


class Classification(BaseModel):
    """The answer to a request; `results` are in the order of its images."""

    model: str
    version: int
    requested: str | None
    results: list[Result]
    choice: dict[str, Any] | None
    """Why a family chose this model; null where a model was named."""
    timings_ms: Timings
    request_id: str


class ModelSummary(BaseModel):
    """A model of the repository."""

    name: str
    version: int | None
    state: str
    """`ready`, or `unavailable` with a reason."""
    reason: str | None = None
    default: bool = False
    family: str | None = None
    variant: str | None = None
    kv_tokens: int | None = None
    tokens: int | None = None
    parameters: int | None = None
    macs: int | None = None
    precision: str | None = None
    image_size: int | None = None
    classes: int | None = None
    accuracy: Accuracy | None = None


class ModelList(BaseModel):
    """All models of the repository."""

    models: list[ModelSummary]


_BODY = {
    "requestBody": {
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
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status, text in {
        400: "Damaged image or malformed body",
        404: "Unknown model",
        408: "The body took too long to arrive: safe to retry",
        413: "Body too large",
        415: "Not an image of an accepted format",
        422: "Too many pixels, or an invalid parameter",
        429: "Busy: retry after `Retry-After` seconds",
        503: "Not ready: safe to retry",
    }.items()
}


def router(classifier: Classifier) -> APIRouter:
    """The routes under /v1, answering with `classifier`."""
    routes = APIRouter(prefix="/v1", tags=["v1"])

    @routes.post("/classify", response_model=Classification, responses=_PROBLEMS, openapi_extra=_BODY)
    async def classify(
        request: Request,
        model: Annotated[
            str | None, Query(max_length=100, description="Name; without it the default model answers.")
        ] = None,
        top_k: Annotated[int, Query(ge=1, le=1000, description="How many classes, best first.")] = 5,
    ) -> JSONResponse:
        """Classify one or many images. A request fails only if every image of it fails."""
        started = time.perf_counter()
        chosen = classifier.registry.find(model)
        with classifier.admit():
            images = await read_images(
                request,
                max_bytes=classifier.settings.max_body_bytes,
                max_images=classifier.settings.max_images,
                seconds=classifier.settings.read_seconds,
            )
            read_ms = (time.perf_counter() - started) * 1000
            with classifier.admit(len(images) - 1):
                answers = await classifier.classify(chosen, images)
        failed = [answer for answer in answers if isinstance(answer, RequestError)]
        if len(failed) == len(answers):
            raise failed[0]
        done = [answer for answer in answers if isinstance(answer, Classified)]
        return JSONResponse(
            {
                "model": chosen.manifest.name,
                "version": chosen.bundle.version,
                "requested": model,
                "results": [_result(chosen, answer, top_k) for answer in answers],
                "choice": None,
                "timings_ms": {
                    "read": round(read_ms, 3),
                    "decode": round(max(answer.decode_ms for answer in done), 3),
                    "queue": round(max(answer.output.queue_ms for answer in done), 3),
                    "inference": round(max(answer.output.inference_ms for answer in done), 3),
                    "total": round((time.perf_counter() - started) * 1000, 3),
                },
                "request_id": request.scope["state"]["request_id"],
            }
        )

    @routes.get("/models", response_model=ModelList, response_model_exclude_none=True)
    async def models() -> ModelList:
        """All models of the repository, with what they are and whether they take traffic."""
        registry = classifier.registry
        ready = [_summary(model, default=name == registry.default) for name, model in registry.models.items()]
        broken = [
            ModelSummary(name=name, version=None, state="unavailable", reason=reason)
            for name, reason in registry.failed.items()
        ]
        return ModelList(models=sorted(ready + broken, key=lambda summary: summary.name))

    return routes


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
    return ModelSummary(
        name=manifest.name,
        version=model.bundle.version,
        state="ready",
        default=default,
        family=manifest.family,
        variant=manifest.variant,
        kv_tokens=manifest.kv_tokens,
        tokens=manifest.tokens,
        parameters=manifest.parameters,
        macs=manifest.macs,
        precision=manifest.precision,
        image_size=manifest.preprocessing.crop,
        classes=manifest.classes,
        accuracy=manifest.accuracy,
    )
